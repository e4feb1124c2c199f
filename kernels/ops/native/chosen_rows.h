// Which rows of a query block are scored for all of them (docs/adr/0030): a part of programs.cpp, which includes it in
// its namespace. sentei/kernels/scorer/rows.py is the definition.

constexpr int RUN_ROWS = 16;

// The lane of the largest of RUN_ROWS numbers, none of them NaN: the first one of equals, and of those that differ by
// less than 16 units of the last place, where the lane's own number stands.
inline int largest_lane(const float* x) {
  int32_t keys[RUN_ROWS];
  std::memcpy(keys, x, sizeof keys);
  for (int r = 0; r < RUN_ROWS; ++r) keys[r] = (keys[r] & ~(RUN_ROWS - 1)) | (RUN_ROWS - 1 - r);
#if defined(__AVX512F__)
  const int32_t most = _mm512_reduce_max_epi32(_mm512_loadu_si512(keys));
#else
  const int32_t most = *std::max_element(keys, keys + RUN_ROWS);
#endif
  return RUN_ROWS - 1 - (most & (RUN_ROWS - 1));
}

// Finds the rows of a query block that differ most.
template <class P>
struct RowChoice {
  typedef typename P::Cell Cell;
  static constexpr int STEP = 4;  // sums that run beside each other
  const int64_t D, cells;
  std::vector<Cell> panel;  // [cell][row] of a run
  explicit RowChoice(int64_t D) : D(D), cells(up(up(D, P::PER) / P::PER, STEP)), panel(cells * RUN_ROWS) {}

  // Products [RUN_ROWS] of all rows of the run with one of them, or of each with itself.
  void multiply(int pick, bool with_itself, float* products) const {
    for (int r = 0; r < RUN_ROWS; r += VL) {
      vec sum[STEP] = {};
      for (int64_t c = 0; c < cells; c += STEP)
#pragma GCC unroll 4
        for (int i = 0; i < STEP; ++i) {
          const Cell* row = &panel[(c + i) * RUN_ROWS];
          const auto x = P::load_cells(row + r);
          P::add_product(sum[i], x, with_itself ? x : P::repeat(row[pick]));
        }
      store(products + r, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }

  // Of `rows` rows those `num`, as bits, that farthest-first traversal finds, the first one first. A row that is no number
  // is infinitely far.
  uint32_t farthest_first(int rows, int num) const {
    float sizes[RUN_ROWS], least[RUN_ROWS], products[RUN_ROWS];
    multiply(0, true, sizes);
    for (int r = 0; r < RUN_ROWS; ++r) least[r] = r < rows ? INF : -1.0f;
    uint32_t chosen = 1;
    for (int i = 1, pick = 0; i < num; ++i) {
      multiply(pick, false, products);
      const float own = sizes[pick];
      for (int r = 0; r < RUN_ROWS; r += VL) {
        const vec raw = load(sizes + r) + own - 2.0f * load(products + r), old = load(least + r);
        const vec away = raw < 0.0f ? vec{} : raw;
        store(least + r, away < old ? away : old);
      }
      least[pick] = -1.0f;
      pick = largest_lane(least);
      chosen |= 1u << pick;
    }
    return chosen;
  }

  // Writes which of the `rows` queries x are scored, one in `one_in` of each RUN_ROWS, and returns how many there are.
  template <class S>
  int choose(const S* x, int64_t stride, int rows, int64_t one_in, int* chosen) {
    int kept = 0;
    if (one_in <= 1) {
      for (; kept < rows; ++kept) chosen[kept] = kept;
      return kept;
    }
    for (int first = 0; first < rows; first += RUN_ROWS) {
      const int num = std::min(RUN_ROWS, rows - first);
      P::template pack_rows<RUN_ROWS>(x + first * stride, stride, num, D, panel.data());
      uint32_t bits = farthest_first(num, std::min(num, int(RUN_ROWS / one_in)));
      for (; bits; bits &= bits - 1) chosen[kept++] = first + __builtin_ctz(bits);
    }
    return kept;
  }
};
