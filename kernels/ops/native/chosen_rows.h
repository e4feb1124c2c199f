// Which rows of a query block are scored for all of them (docs/adr/0030): a part of programs.cpp, which includes it in
// its namespace. sentei/kernels/scorer/rows.py is the definition.

constexpr int RUN_ROWS = 16;

// The lane of the largest of RUN_ROWS numbers, none of them NaN: the first one of equals, and of those that differ by
// less than 16 units of the last place, where the lane's own number stands.
inline int largest_lane(const float* x) {
  int32_t keys[RUN_ROWS];
  std::memcpy(keys, x, sizeof keys);
  for (int r = 0; r < RUN_ROWS; ++r) keys[r] = (keys[r] & ~(RUN_ROWS - 1)) | (RUN_ROWS - 1 - r);
  for (int half = RUN_ROWS / 2; half > 0; half /= 2)
    for (int r = 0; r < half; ++r) keys[r] = std::max(keys[r], keys[r + half]);
  return RUN_ROWS - 1 - (keys[0] & (RUN_ROWS - 1));
}

// Of `rows` rows those `num`, as bits, that farthest-first traversal finds, the first one first; products [RUN_ROWS, ldc]
// are those of all pairs. A row that is no number is infinitely far.
inline uint32_t farthest_first(const float* products, int64_t ldc, int rows, int num) {
  float sizes[RUN_ROWS], least[RUN_ROWS];
  for (int r = 0; r < RUN_ROWS; ++r) {
    sizes[r] = r < rows ? products[r * ldc + r] : 0.0f;
    least[r] = r < rows ? INF : -1.0f;
  }
  uint32_t chosen = 1;
  for (int i = 1, pick = 0; i < num; ++i) {
    const float *row = products + pick * ldc, own = sizes[pick];
    for (int r = 0; r < RUN_ROWS; r += VL) {
      const vec raw = load(sizes + r) + own - 2.0f * load(row + r), old = load(least + r);
      const vec away = raw < 0.0f ? vec{} : raw;
      store(least + r, away < old ? away : old);
    }
    least[pick] = -1.0f;
    pick = largest_lane(least);
    chosen |= 1u << pick;
  }
  return chosen;
}

// Finds the rows of a query block that differ most.
template <class P>
struct RowChoice {
  typedef typename P::Cell Cell;
  static constexpr int LDC = RUN_ROWS > NR ? RUN_ROWS : NR;
  const int64_t D, cells;
  std::vector<Cell> query, panel;
  std::vector<float> products, row;
  explicit RowChoice(int64_t D)
      : D(D), cells(up(D, P::PER) / P::PER), query(RUN_ROWS * cells), panel(LDC * cells), products(RUN_ROWS * LDC),
        row(D) {}

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
      const S* run = x + first * stride;
      for (int r = 0; r < num; ++r) {
        widen_row(run + r * stride, D, row.data());
        P::pack_features(row.data(), D, query.data() + r * cells);
      }
      for (int t = 0; t < RUN_ROWS; t += NR) {
        P::pack_key_panel(run, stride, t, num, D, panel.data() + t * cells);
        rows_by_panel<P>(num, int(cells), query.data(), cells, panel.data() + t * cells, products.data() + t, LDC);
      }
      const uint32_t bits = farthest_first(products.data(), LDC, num, std::min(num, int(RUN_ROWS / one_in)));
      for (int r = 0; r < num; ++r)
        if (bits >> r & 1) chosen[kept++] = first + r;
    }
    return kept;
  }
};
