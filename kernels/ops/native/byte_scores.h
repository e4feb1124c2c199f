// Scores of single tokens from features of 8 bits: a part of programs.cpp, which includes it in its namespace.
//
// A feature of a key is an unsigned byte, its value in steps of a per-dimension size plus 128; a feature of a query is
// a signed byte in steps of a per-row size. Sums of products are exact in 32 bits. Lanes are key blocks, so that a
// block's tokens are summed up lane by lane, without a reduction across lanes.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// Keys beyond so many standard deviations are cut: measured on SmolLM2, 4 misses two thirds of the needles that the
// largest value as the end of the range does.
constexpr float BYTE_RANGE = 4.0f;
constexpr int64_t BYTE_CELLS_MAX = 16;  // four dimensions each
constexpr int BYTE_ROWS = 8;

inline bool has_byte_scores(int64_t rank) { return rank <= 4 * BYTE_CELLS_MAX; }

struct ByteRow {
  float step, correction, reference;  // logit = step * (sum - correction); sums of exp(logit - reference)
  bool is_bounded;                    // whether no logit can lie so far above the reference that its power overflows
};

// sums[M, VL] of exp(logit - reference) over a block's tokens; a panel is [token][C][VL] cells of four bytes. The
// exponential is linear between powers of two (6% at most, without a mean error): a block sums many.
template <int C, int M, bool BOUNDED>
inline void sum_panel(int64_t tokens, const uint32_t* panel, const uint32_t* query, const ByteRow* rows, float* sums) {
  const float unit = 8388608.0f, log2e = 1.44269504f, middle = 127.0f - 0.0575f;
  __m512 total[M], scale[M], shift[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    total[r] = _mm512_setzero_ps();
    scale[r] = _mm512_set1_ps(rows[r].step * log2e * unit);
    shift[r] = _mm512_set1_ps((middle - (rows[r].step * rows[r].correction + rows[r].reference) * log2e) * unit);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t* cells = panel + t * C * VL;
    __m512i x[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) x[r] = _mm512_setzero_si512();
    // A cell is loaded once for all rows; the other way round its loads are what takes the time.
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const __m512i cell = _mm512_loadu_si512(cells + c * VL);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) x[r] = _mm512_dpbusd_epi32(x[r], cell, _mm512_set1_epi32(int(query[r * C + c])));
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      __m512 power = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x[r]), scale[r], shift[r]);
      if (!BOUNDED) power = _mm512_min_ps(power, _mm512_set1_ps(240.0f * unit));  // 2^113: 64 of them are finite
      const __m512i bits = _mm512_cvtps_epi32(_mm512_max_ps(power, _mm512_setzero_ps()));
      total[r] = _mm512_add_ps(total[r], _mm512_castsi512_ps(bits));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) _mm512_storeu_ps(sums + r * VL, total[r]);
}

template <int C>
void sum_panels(int rows, int64_t columns, int64_t tokens, const uint32_t* panels, const uint32_t* query,
                const ByteRow* how, float* logits, int64_t stride) {
  float sums[BYTE_ROWS * VL];
  by_rows<BYTE_ROWS>(rows, [&](int r, auto m) {
    bool is_bounded = true;
    for (int i = 0; i < m; ++i) is_bounded &= how[r + i].is_bounded;
    for (int64_t c = 0; c < columns; c += VL) {
      if (is_bounded)
        sum_panel<C, m, true>(tokens, panels + c * tokens * C, query + r * C, how + r, sums);
      else
        sum_panel<C, m, false>(tokens, panels + c * tokens * C, query + r * C, how + r, sums);
      for (int i = 0; i < m; ++i)
        store(logits + (r + i) * stride + c, log_of(larger(load(sums + i * VL), splat(1e-37f))) + how[r + i].reference);
    }
  });
}

// The step of each dimension: BYTE_RANGE standard deviations over 127, of the keys that may be chosen. NaN where a key
// is not finite, so that no score hides it.
template <class S>
void find_steps(const S* keys, int64_t first, int64_t last, int64_t rank, float* steps) {
  std::vector<double> sums(2 * rank, 0.0);
  for (int64_t t = first; t < last; ++t)
    for (int64_t d = 0; d < rank; ++d) {
      const float x = widen(keys[t * rank + d]);
      sums[d] += x;
      sums[rank + d] += double(x) * x;
    }
  const double num = double(std::max<int64_t>(last - first, 1));
  for (int64_t d = 0; d < rank; ++d) {
    const double mean = sums[d] / num, square = sums[rank + d] / num;
    const double range = BYTE_RANGE * std::sqrt(std::max(square - mean * mean, 0.0)) + std::fabs(mean);
    steps[d] = std::isfinite(square) ? float(std::max(range, 1e-20) / 127.0) : NAN;
  }
}

template <class S>
void pack_bytes(const S* keys, int64_t block0, int64_t blocks, int64_t tokens, int64_t rank, int64_t cells,
                const float* steps, uint32_t* panel) {
  alignas(64) uint8_t row[4 * BYTE_CELLS_MAX];
  for (int64_t lane = 0; lane < VL; ++lane)
    for (int64_t t = 0; t < tokens; ++t) {
      std::memset(row, 128, sizeof row);
      if (block0 + lane < blocks) {
        const S* x = keys + ((block0 + lane) * tokens + t) * rank;
        for (int64_t d = 0; d < rank; ++d) {
          const float value = widen(x[d]) * steps[d];
          row[d] = uint8_t(int(std::nearbyint(value < -127.0f ? -127.0f : (value > 127.0f ? 127.0f : value))) + 128);
        }
      }
      for (int64_t c = 0; c < cells; ++c) std::memcpy(&panel[(t * cells + c) * VL + lane], row + 4 * c, 4);
    }
}

// One row's features to signed bytes; the row's numbers, of which `reference` is what sums are taken relative to.
inline ByteRow pack_byte_query(const float* x, int64_t rank, int64_t cells, float forced, uint32_t* query) {
  float top = 0.0f, all = 0.0f;
  for (int64_t d = 0; d < rank; ++d) {
    top = std::max(top, std::fabs(x[d]));
    all += std::fabs(x[d]);
  }
  const float step = std::max(top, 1e-20f) / 127.0f;
  int8_t row[4 * BYTE_CELLS_MAX] = {};
  int total = 0;
  if (std::isfinite(all))
    for (int64_t d = 0; d < rank; ++d) total += row[d] = int8_t(std::nearbyint(x[d] / step));
  std::memcpy(query, row, 4 * cells);
  return {step, 128.0f * float(total), std::isfinite(all) ? forced : NAN, 127.0f * all - forced < 75.0f};
}

inline int64_t byte_cells(int64_t rank) { return rank <= 16 ? 4 : rank <= 32 ? 8 : rank <= 48 ? 12 : 16; }

// Cells of one KV head's panels, floats of one query head's map: [columns of NR][2 D][NR].
inline int64_t byte_panel_size(const Scores& p) { return up(p.blocks, VL) * p.block * byte_cells(p.rank); }
inline int64_t byte_map_size(const Scores& p) { return up(p.rank, NR) * 2 * p.D; }

// Features of all keys to bytes, panels [Hkv, byte_panel_size]; each query map times the steps of those bytes, packed
// [H, byte_map_size]. Both are a function of the features of the full blocks alone.
template <class S>
void pack_byte_panels(const Scores& p, const S* pooled, const float* maps, uint32_t* panels, float* packed,
                      int threads) {
  const int64_t group = p.H / p.Hkv, columns = up(p.blocks, VL), cells = byte_cells(p.rank), W = 2 * p.D;
  std::vector<float> steps(p.Hkv * p.rank), inverse(p.Hkv * p.rank);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t h_kv = 0; h_kv < p.Hkv; ++h_kv) {
      float* step = steps.data() + h_kv * p.rank;
      find_steps(pooled + h_kv * p.pooled_h, std::min(p.block, p.blocks * p.block), p.blocks * p.block, p.rank, step);
      for (int64_t d = 0; d < p.rank; ++d) inverse[h_kv * p.rank + d] = 1.0f / step[d];
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < p.Hkv * columns / VL; ++task) {
      const int64_t h_kv = task / (columns / VL), c = task % (columns / VL) * VL;
      pack_bytes(pooled + h_kv * p.pooled_h, c, p.blocks, p.block, p.rank, cells, inverse.data() + h_kv * p.rank,
                 panels + h_kv * byte_panel_size(p) + c * p.block * cells);
    }
#pragma omp for schedule(static)
    for (int64_t h = 0; h < p.H; ++h) {
      const float* step = steps.data() + h / group * p.rank;
      float* map = packed + h * byte_map_size(p);
      for (int64_t c = 0; c < up(p.rank, NR); ++c)
        for (int64_t d = 0; d < W; ++d)
          map[c / NR * NR * W + d * NR + c % NR] = c < p.rank ? maps[(h * W + d) * p.rank + c] * step[c] : 0.0f;
    }
  }
}

// What `scores` gives for single tokens without the residual, from what pack_byte_panels made; the heads of a KV group
// share each panel. `batch` sequences lie q_b and k_b apart, their panels, maps and shares one behind the other.
template <class P, class S>
void byte_scores(const Scores& p, int64_t batch, const S* q_all, int64_t q_b, const S* k_all, int64_t k_b,
                 const uint32_t* panels_all, const float* maps_all, const float* cos, const float* sin,
                 const float* bias, float scale, float* out_all, int threads) {
  typedef typename P::Cell Cell;
  const int64_t group = p.H / p.Hkv, columns = up(p.blocks, VL), wide = up(p.block, NR), W = 2 * p.D;
  const int64_t padded = up(p.rank, NR), raw_cells = up(p.D, P::PER) / P::PER, all = group * p.rows;
  const int64_t cells = byte_cells(p.rank), panel = wide * raw_cells;
  std::vector<Cell> sinks(batch * p.Hkv * panel);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> logits(all * columns), exact(p.rows * wide), scratch(2 * p.D), plain(p.rows * W),
        encoded(p.rows * padded), forced(all), far(columns), most(columns);
    std::vector<Cell> near(2 * panel), raw_query(p.rows * raw_cells);
    std::vector<uint32_t> query(all * cells);
    std::vector<ByteRow> how(all);
#pragma omp for schedule(static)
    for (int64_t bh = 0; bh < batch * p.Hkv; ++bh)
      for (int64_t t = 0; t < wide; t += NR)
        P::pack_key_panel(k_all + bh / p.Hkv * k_b + bh % p.Hkv * p.k_h, p.k_t, t, std::min(p.block, p.T), p.D,
                          sinks.data() + bh * panel + t * raw_cells);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < batch * p.Hkv * p.n; ++task) {
      const int64_t bh = task / p.n, b = bh / p.Hkv, h_kv = bh % p.Hkv, i_q = p.n - 1 - task % p.n;
      const int64_t row0 = i_q * p.rows * p.row_tokens, start = p.first + row0;
      const int64_t home = start / p.block, open = std::min(home, p.blocks);
      const int rows = int(p.row_tokens > 1 ? p.rows : std::min(p.rows, p.num_rows - row0));
      if (open <= 1) continue;
      const S* raw = k_all + b * k_b + h_kv * p.k_h;
      const int64_t end = std::min(start + p.rows * p.row_tokens, p.first + p.num_rows);
      for (int64_t i = home; i * p.block < end; ++i)
        for (int64_t t = 0; t < wide; t += NR)
          P::pack_key_panel(raw + i * p.block * p.k_t, p.k_t, t, std::min(p.block, p.T - i * p.block), p.D,
                            near.data() + (i - home) * panel + t * raw_cells);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = h_kv * group + g;
        const S* own = q_all + b * q_b + h * p.q_h;
        const float* map = maps_all + (b * p.H + h) * byte_map_size(p);
        float* seen = forced.data() + g * rows;
        for (int r = 0; r < rows; ++r) {
          float* row = &plain[r * W];
          mean_query(p, own, row0 + r * p.row_tokens, cos, sin, scratch.data(), row, row + p.D);
          P::pack_features(row, p.D, raw_query.data() + r * raw_cells);
        }
        for (int64_t c = 0; c < padded; c += NR)
          rows_by_panel(rows, int(W), plain.data(), W, map + c * W, encoded.data() + c, padded);
        std::fill(seen, seen + rows, -INF);
        measure_block<P>(p, raw_query.data(), sinks.data() + bh * panel, rows, start, 0, scale, exact.data(), seen);
        for (int64_t i = home; i * p.block < end; ++i)
          measure_block<P>(p, raw_query.data(), near.data() + (i - home) * panel, rows, start, i, scale, exact.data(),
                           seen);
        for (int r = 0; r < rows; ++r)
          how[g * rows + r] = pack_byte_query(encoded.data() + r * padded, p.rank, cells, seen[r],
                                              query.data() + (g * rows + r) * cells);
      }
      auto sum_up = [&](auto c) {
        sum_panels<c>(int(group * rows), up(open, VL), p.block, panels_all + bh * byte_panel_size(p), query.data(),
                      how.data(), logits.data(), columns);
      };
      if (cells == 4) sum_up(std::integral_constant<int, 4>{});
      if (cells == 8) sum_up(std::integral_constant<int, 8>{});
      if (cells == 12) sum_up(std::integral_constant<int, 12>{});
      if (cells == 16) sum_up(std::integral_constant<int, 16>{});
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = h_kv * group + g;
        best_shares(p, rows, columns, open, bias + h * p.num_bias + home, forced.data() + g * rows,
                    logits.data() + g * rows * columns, far.data(), most.data(),
                    out_all + ((b * p.H + h) * p.n + i_q) * p.out_blocks);
      }
    }
  }
}

#else

inline bool has_byte_scores(int64_t) { return false; }
inline int64_t byte_panel_size(const Scores&) { return 0; }
inline int64_t byte_map_size(const Scores&) { return 0; }
template <class S>
void pack_byte_panels(const Scores&, const S*, const float*, uint32_t*, float*, int) {}
template <class P, class S>
void byte_scores(const Scores&, int64_t, const S*, int64_t, const S*, int64_t, const uint32_t*, const float*,
                 const float*, const float*, const float*, float, float*, int) {}

#endif
