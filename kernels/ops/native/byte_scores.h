// Scores of single tokens from features of 8 bits: a part of programs.cpp, which includes it in its namespace.
//
// A feature of a key is an unsigned byte, its value in steps that the scorer has for each dimension plus 128; a feature of
// a query is a signed byte in steps of its row, with which a sum of products, exact in 32 bits, is a whole number of
// 2^(shift - 23) octaves. Lanes are key blocks, so that a block's tokens are summed up lane by lane, without a reduction
// across lanes.

struct ByteRow {
  int32_t shift, correction;  // logit in octaves = (sum - correction) * 2^(shift - 23)
  float per_nat;              // how many of these a nat is
  float reference;            // what sums of exp(logit - reference) are taken relative to, in nats
  float start;                // what a sum of products starts with, but for bias and correction
  bool is_bounded;            // whether no logit can lie so far above the reference that its power overflows
};

// A feature in steps of its dimension; `flaw` becomes NaN where it is no number, so that no score hides it.
inline uint8_t to_byte(float x, float inverse_step, float* flaw) {
  const float steps = x * inverse_step;
  if (!(std::fabs(steps) <= 127.0f)) {
    if (!std::isfinite(steps)) *flaw = NAN;
    return steps < 0.0f ? 1 : 255;
  }
  return uint8_t(int(std::nearbyint(steps)) + 128);
}

#if HAS_BYTE_PRODUCTS

#if defined(__AVX512F__)
#define SIMD(operation) _mm512_##operation
typedef __m512 reals;
typedef __m512i wholes;
#else
#define SIMD(operation) _mm256_##operation
typedef __m256 reals;
typedef __m256i wholes;
#endif
inline ivec nearest(vec x) { return (ivec)SIMD(cvtps_epi32)((reals)x); }
inline ivec shift_left(ivec x, ivec by) { return (ivec)SIMD(sllv_epi32)((wholes)x, (wholes)by); }

// sum + cells * query, four products of an unsigned and a signed byte in each lane; the latter go to QUERY_BYTES. Without
// an instruction for it two products are summed in 16 bits, where they have to fit.
#if defined(__AVX512VNNI__)
constexpr float QUERY_BYTES = 127.0f;
inline ivec add_products(ivec sum, ivec cells, ivec query) {
  return (ivec)_mm512_dpbusd_epi32((wholes)sum, (wholes)cells, (wholes)query);
}
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr float QUERY_BYTES = 127.0f;
inline ivec add_products(ivec sum, ivec cells, ivec query) {
  return (ivec)_mm256_dpbusd_avx_epi32((wholes)sum, (wholes)cells, (wholes)query);
}
#else
constexpr float QUERY_BYTES = 63.0f;
inline ivec add_products(ivec sum, ivec cells, ivec query) {
  const wholes pairs = SIMD(maddubs_epi16)((wholes)cells, (wholes)query);
  return sum + (ivec)SIMD(madd_epi16)(pairs, SIMD(set1_epi16)(1));
}
#endif
inline vec within(vec x, float most) {
  return larger(x < most ? x : splat(most), splat(-most));
}
inline ivec load_cells(const uint32_t* x) {
  ivec cells;
  std::memcpy(&cells, x, sizeof cells);
  return cells;
}
// Whole numbers that fit, to bytes.
typedef int8_t byte_vec __attribute__((vector_size(VL)));
inline void store_bytes(void* to, ivec x) {
  const byte_vec bytes = __builtin_convertvector(x, byte_vec);
  std::memcpy(to, &bytes, sizeof bytes);
}

constexpr int64_t BYTE_CELLS_MAX = 16;         // four dimensions each
constexpr int BYTE_ROWS = VL == 16 ? 4 : 2;    // as many as registers hold
constexpr uint32_t NO_FEATURES = 0x80808080u;  // four zeros

inline bool has_byte_scores(int64_t rank) { return rank <= 4 * BYTE_CELLS_MAX; }

constexpr float LOG2E = 1.44269504f, ONE_OCTAVE = 8388608.0f;  // an exponent of two, in units of a float's last place
// What an unbounded logit is cut to, as an exponent: 2^30 of such powers of two are finite.
constexpr int32_t TOP_EXPONENT = (127 + 95) << 23;
constexpr float BOUND_NATS = 65.0f;  // below 95 octaves
// Beyond it a unit is 16 octaves, and larger ones count as these: a logit far above the reference stays far above it.
constexpr int32_t MOST_SHIFT = 27;
constexpr float FAR_AWAY = 255 * ONE_OCTAVE;  // with the largest sum of products, 2^21, it fits 32 bits

// What sums of products start with, so that shifted left they are the bits of exp(logit + bias - reference).
inline ivec exponents_at_zero(const ByteRow& row, vec bias) {
  const vec start = bias * row.per_nat + row.start;
  return nearest(larger(start < FAR_AWAY ? start : splat(FAR_AWAY), splat(-FAR_AWAY))) - row.correction;
}

// The exponential of sums of products, linear between powers of two (6% at most, without a mean error): many are summed.
template <bool BOUNDED>
inline vec power_of(ivec sums, ivec shift) {
  if (!BOUNDED) {
    const ivec most = ((TOP_EXPONENT - 1) >> shift) + 1;  // no less, so that it cuts no bounded row beside it
    sums = sums < most ? sums : most;
  }
  return (vec)shift_left(sums > 0 ? sums : ivec{}, shift);
}

// sums[M, VL] of exp(logit + bias - reference) over a block's tokens, lanes are blocks, `bias` is theirs; a panel is
// [token][C][VL] cells of four bytes.
template <int C, int M, bool BOUNDED>
__attribute__((noinline)) void sum_panel(int64_t tokens, const uint32_t* panel, const uint32_t* query, const ByteRow* rows,
                      const float* bias, float* sums, int64_t stride) {
  vec total[M];
  ivec shift[M], start[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    total[r] = vec{};
    shift[r] = rows[r].shift + ivec{};
    start[r] = exponents_at_zero(rows[r], load(bias));
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t* cells = panel + t * C * VL;
    ivec x[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) x[r] = start[r];
    // A cell is loaded once for all rows; the other way round its loads are what takes the time.
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const ivec cell = load_cells(cells + c * VL);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) x[r] = add_products(x[r], cell, int32_t(query[r * C + c]) + ivec{});
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) total[r] += power_of<BOUNDED>(x[r], shift[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) store(sums + r * stride, total[r]);
}

template <int C>
void sum_panels(int rows, int64_t columns, int64_t tokens, const uint32_t* panels, const uint32_t* query,
                const ByteRow* how, const float* bias, float* sums, int64_t stride) {
  // All rows read a panel before the next one is: 64 tokens of rank 32 are 32 KiB.
  for (int64_t c = 0; c < columns; c += VL)
    by_rows<BYTE_ROWS>(rows, [&](int r, auto m) {
      const uint32_t *panel = panels + c * tokens * C, *own = query + r * C;
      bool is_bounded = true;
      for (int i = 0; i < m; ++i) is_bounded &= how[r + i].is_bounded;
      if (is_bounded)
        sum_panel<C, m, true>(tokens, panel, own, how + r, bias + c, sums + r * stride + c, stride);
      else
        sum_panel<C, m, false>(tokens, panel, own, how + r, bias + c, sums + r * stride + c, stride);
    });
}

// The largest share over a query block's rows of each open block; sums [rows, columns] lie relative to what the forced
// blocks hold of the row; best [open] as logs, -inf of the sink. Returns whether one is NaN.
__attribute__((noinline)) bool best_byte_shares(int rows, int64_t columns, int64_t open, const ByteRow* how, const float* sums,
                             float* most, float* best) {
  const int64_t end = up(open, VL);
  std::fill(most, most + end, 0.0f);
  for (int r = 0; r < rows; ++r) {
    const float* row = sums + r * columns;
    vec total{};
    for (int64_t j = 0; j < end; j += VL) total += load(row + j);
    const float forced = how[r].reference == how[r].reference ? 1.0f : NAN;
    const float share = 1.0f / (forced + sum(total));
    for (int64_t j = 0; j < end; j += VL) {
      const vec own = load(row + j) * share, old = load(most + j);
      store(most + j, own > old ? own : (own == own ? old : own));  // NaN is kept
    }
  }
  for (int64_t j = 0; j < end; j += VL) {
    const vec x = load(most + j);
    store(most + j, log_of(x < 1e-37f ? splat(1e-37f) : x));
  }
  best[0] = -INF;
  std::memcpy(best + 1, most + 1, sizeof(float) * (open - 1));
  return has_nan(most, end);
}

// Blocks `block0` .. `block0` + VL of one head to one panel; NaN where a feature is no number, else 0. `keys` begin with
// block `from`: those before it are in the panel already. inverse_steps [4 * cells] are 0 where there is no dimension.
template <class S>
float pack_bytes(const S* keys, int64_t block0, int64_t from, int64_t blocks, int64_t tokens, int64_t rank, int64_t cells,
                 const float* inverse_steps, uint32_t* panel) {
  float row[4 * BYTE_CELLS_MAX] = {};
  uint32_t bytes[BYTE_CELLS_MAX];
  vec flaw{};
  for (int64_t lane = std::max<int64_t>(0, from - block0); lane < VL; ++lane)
    for (int64_t t = 0; t < tokens; ++t) {
      if (block0 + lane >= blocks) {
        for (int64_t c = 0; c < cells; ++c) panel[(t * cells + c) * VL + lane] = NO_FEATURES;
        continue;
      }
      const S* x = keys + ((block0 + lane - from) * tokens + t) * rank;
      for (int64_t d = 0; d < rank; ++d) row[d] = widen(x[d]);
      for (int64_t d = 0; d < 4 * cells; d += VL) {
        const vec steps = load(row + d) * load(inverse_steps + d);
        flaw += steps * 0.0f;  // infinity and NaN give NaN
        store_bytes((uint8_t*)bytes + d, nearest(within(steps, 127.0f)) + 128);
      }
      for (int64_t c = 0; c < cells; ++c) panel[(t * cells + c) * VL + lane] = bytes[c];
    }
  return sum(flaw);
}

inline double two_to(int exponent) {
  const uint64_t bits = uint64_t(1023 + exponent) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// One row's features [4 * cells] to signed bytes; the row's numbers, of which `reference` is what sums are taken
// relative to, and `bias` the largest that is added to a logit.
__attribute__((noinline)) ByteRow pack_byte_query(const float* x, int64_t cells, float reference, float bias, uint32_t* query) {
  vec high{}, all{};
  for (int64_t d = 0; d < 4 * cells; d += VL) {
    const vec size = (vec)((ivec)load(x + d) & 0x7FFFFFFF);
    high = larger(size, high);
    all += size;
  }
  if (!std::isfinite(sum(all)) || !std::isfinite(bias)) {
    std::memset(query, 0, 4 * cells);
    return {0, 0, 0.0f, NAN, 0.0f, false};
  }
  // The least power of two that the largest feature is a byte of.
  int exponent;
  std::frexp(double(peak(high)) * (LOG2E * ONE_OCTAVE / QUERY_BYTES), &exponent);
  exponent = std::max(exponent, 0);
  const int32_t shift = std::min(exponent, MOST_SHIFT);
  const float per_nat = float(LOG2E * two_to(23 - exponent));
  int32_t total = 0, reach = 0;
  ivec totals{}, reaches{};
  for (int64_t d = 0; d < 4 * cells; d += VL) {
    const ivec byte = nearest(within(load(x + d) * per_nat, QUERY_BYTES));
    totals += byte;
    reaches += byte < 0 ? -byte : byte;
    store_bytes(query + d / 4, byte);
  }
  for (int j = 0; j < VL; ++j) total += totals[j], reach += reaches[j];
  const float most = 127.0f * float(reach) / per_nat + bias;
  const float middle = (127.0f - 0.0575f) * float(two_to(23 - shift));  // powers have no mean error
  return {shift, 128 * total, per_nat, reference, middle - reference * per_nat, most - reference < BOUND_NATS};
}

inline int64_t byte_cells(int64_t rank) { return rank <= 16 ? 4 : rank <= 32 ? 8 : rank <= 48 ? 12 : 16; }

// Cells of one KV head's panels, which lie panel_h apart; floats of one query head's map: [columns of NR][2 D][NR].
inline int64_t byte_panel_size(const Scores& p) { return up(p.blocks, VL) * p.block * byte_cells(p.rank); }
inline int64_t byte_map_size(const Scores& p) { return up(p.rank, NR) * 2 * p.D; }

// Runs `pack(h_kv, first block, panel)` for all panels [Hkv, panel_h] from that of `from_block` on; flaws [Hkv] are NaN
// where it says so, or said so of a panel before.
template <class F>
void fill_panels(const Scores& p, uint32_t* panels, float* flaws, int threads, F&& pack) {
  const int64_t first = p.from_block / VL, columns = up(p.blocks, VL) / VL - first;
  const int64_t size = VL * p.block * byte_cells(p.rank);
  if (p.from_block == 0) std::fill(flaws, flaws + p.Hkv, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < p.Hkv * columns; ++task) {
    const int64_t h_kv = task / columns, c = first + task % columns;
    const float flaw = pack(h_kv, c * VL, panels + h_kv * p.panel_h + c * size);
    if (flaw == flaw) continue;
#pragma omp atomic write
    flaws[h_kv] = flaw;
  }
}

// Features of keys to bytes in steps of their dimension: a key's bytes depend on that key alone.
template <class S>
void pack_byte_panels(const Scores& p, const S* pooled, const float* inverse_steps, uint32_t* panels, float* flaws,
                      int threads) {
  const int64_t cells = byte_cells(p.rank);
  std::vector<float> inverse(p.Hkv * 4 * cells);
  for (int64_t h = 0; h < p.Hkv; ++h) std::copy_n(inverse_steps + h * p.rank, p.rank, &inverse[h * 4 * cells]);
  fill_panels(p, panels, flaws, threads, [&](int64_t h, int64_t block, uint32_t* panel) {
    return pack_bytes(pooled + h * p.pooled_h, block, p.from_block, p.blocks, p.block, p.rank, cells,
                      &inverse[h * 4 * cells], panel);
  });
}

// The same panels from the bytes of a sequence's pages: cells [P, Hkv, C, block], their flaws [P, Hkv].
inline void gather_byte_panels(const Scores& p, const int32_t* table, const uint32_t* pages, const float* page_flaws,
                               uint32_t* panels, float* flaws, int threads) {
  const int64_t cells = byte_cells(p.rank);
  fill_panels(p, panels, flaws, threads, [&](int64_t h, int64_t block, uint32_t* panel) {
    float flaw = 0.0f;
    for (int64_t lane = 0; lane < VL; ++lane) {
      const int64_t at = block + lane < p.blocks ? table[block + lane] * p.Hkv + h : -1;
      if (at >= 0) flaw += page_flaws[at];
      for (int64_t c = 0; c < cells; ++c)
        for (int64_t t = 0; t < p.block; ++t)
          panel[(t * cells + c) * VL + lane] = at < 0 ? NO_FEATURES : pages[(at * cells + c) * p.block + t];
    }
    return flaw;
  });
}

// Each query map times the steps of the bytes it meets, packed [H, byte_map_size].
inline void pack_byte_maps(const Scores& p, const float* maps, const float* steps, float* packed) {
  const int64_t group = p.H / p.Hkv, W = 2 * p.D;
  for (int64_t h = 0; h < p.H; ++h) {
    float* map = packed + h * byte_map_size(p);
    pack_map(maps + h * W * p.rank, W, p.rank, map);
    for (int64_t c = 0; c < p.rank; ++c)
      for (int64_t d = 0; d < W; ++d) map[c / NR * NR * W + d * NR + c % NR] *= steps[h / group * p.rank + c];
  }
}

// Log of what the sink and `num` near blocks of raw keys, from block `home` on, hold of each row: forced [up(rows, VL)].
// A row sees what the token at lasts[row] sees. `exact` [rows, (1 + num) * wide] and `tops` [rows] are room.
template <class P>
__attribute__((noinline)) void measure_forced(const Scores& p, const typename P::Cell* query, const typename P::Cell* sink,
                    const typename P::Cell* near, int rows, int64_t num, const int64_t* lasts, int64_t home, float scale,
                    float* exact, float* tops, float* forced) {
  const int64_t wide = up(p.block, NR), cells = up(p.D, P::PER) / P::PER, width = (1 + num) * wide;
  for (int64_t j = 0; j < width; j += NR)
    rows_by_panel<P>(rows, int(cells), query, cells, j < wide ? sink + j * cells : near + (j - wide) * cells,
                     exact + j, width);
  std::fill(forced, forced + up(rows, VL), 1.0f);
  for (int r = 0; r < rows; ++r) {
    float* row = exact + r * width;
    for (int64_t i = 0; i <= num; ++i) {
      const int64_t seen = i == 0 ? p.block : lasts[r] + 1 - (home + i - 1) * p.block;
      for (int64_t j = std::min(std::max<int64_t>(seen, 0), p.block); j < wide; ++j) row[i * wide + j] = -INF;
    }
    vec high = splat(-INF), total{};
    for (int64_t j = 0; j < width; j += VL) {
      const vec x = load(row + j) * scale;
      store(row + j, x);
      high = larger(x, high);
    }
    tops[r] = peak(high);
    for (int64_t j = 0; j < width; j += VL) total += P::exp_of_score(load(row + j) - tops[r]);
    forced[r] = sum(total);
  }
  for (int r = 0; r < rows; r += VL) store(forced + r, log_of(load(forced + r)));
  for (int r = 0; r < rows; ++r) forced[r] += tops[r];
}

// What `scores` gives for single tokens without the residual, from what pack_byte_panels and pack_byte_maps made; the
// heads of a KV group share each panel. `batch` sequences lie q_b and k_b apart, their panels, flaws [Hkv] and shares
// one behind the other. Returns whether a share is NaN.
template <class P, class S>
int byte_scores(const Scores& p, int64_t batch, const S* q_all, int64_t q_b, const S* k_all, int64_t k_b,
                const uint32_t* panels_all, const float* flaws, const float* maps, const float* cos,
                const float* sin, const float* bias, float scale, float* out_all, int threads) {
  typedef typename P::Cell Cell;
  const int64_t group = p.H / p.Hkv, columns = up(p.blocks, VL), wide = up(p.block, NR), W = 2 * p.D;
  const int64_t padded = up(p.rank, NR), raw_cells = up(p.D, P::PER) / P::PER;
  const int64_t cells = byte_cells(p.rank), panel = wide * raw_cells, tokens = p.rows * p.row_tokens;
  const int64_t most_near = (tokens + p.block - 2) / p.block + 1;
  std::vector<Cell> sinks(batch * p.Hkv * panel);
  int is_odd = 0;
#pragma omp parallel num_threads(threads) reduction(| : is_odd)
  {
    std::vector<float> sums(p.rows * columns), exact(p.rows * (1 + most_near) * wide), scratch(W), plain(p.rows * W),
        encoded(p.rows * std::max(padded, 4 * cells)), forced(up(p.rows, VL)), tops(p.rows), far(columns), most(columns);
    std::vector<Cell> near(most_near * panel), raw_query(p.rows * raw_cells);
    std::vector<uint32_t> query(p.rows * cells);
    std::vector<ByteRow> how(p.rows);
    std::vector<int64_t> lasts(p.rows);
    std::vector<int> chosen(p.rows);
    RowChoice<P> choice(p.D);
    Unrotation turn(tokens * p.D);
    int64_t packed_bh = -1, packed_home = -1, packed_num = 0;
#pragma omp for schedule(static)
    for (int64_t bh = 0; bh < batch * p.Hkv; ++bh)
      for (int64_t t = 0; t < wide; t += NR)
        P::pack_key_panel(k_all + bh / p.Hkv * k_b + bh % p.Hkv * p.k_h, p.k_t, t, std::min(p.block, p.T), p.D,
                          sinks.data() + bh * panel + t * raw_cells);
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < batch * p.Hkv * p.n; ++task) {
      const int64_t bh = task / p.n, b = bh / p.Hkv, h_kv = bh % p.Hkv, i_q = p.n - 1 - task % p.n;
      const int64_t row0 = i_q * tokens, start = p.first + row0, live = std::min(tokens, p.num_rows - row0);
      const int64_t home = start / p.block, open = std::min(home, p.blocks);
      const int all_rows = int(p.row_tokens > 1 ? p.rows : live);
      float* out = out_all + ((b * p.H + h_kv * group) * p.n + i_q) * p.out_blocks;  // of the first head of the group
      const int64_t out_h = p.n * p.out_blocks, told = open <= 1 ? 0 : open;
      for (int64_t g = 0; g < group; ++g) std::fill(out + g * out_h + told, out + g * out_h + p.out_blocks, -INF);
      if (open <= 1) continue;
      const S* raw = k_all + b * k_b + h_kv * p.k_h;
      const int64_t num = (start + live - 1) / p.block + 1 - home;
      // Query blocks of one key block follow each other, and it is packed for the first of them.
      if (packed_bh != bh || packed_home != home) packed_num = 0;
      for (int64_t i = packed_num; i < num; ++i)
        for (int64_t t = 0; t < wide; t += NR)
          P::pack_key_panel(raw + (home + i) * p.block * p.k_t, p.k_t, t, std::min(p.block, p.T - (home + i) * p.block),
                            p.D, near.data() + i * panel + t * raw_cells);
      packed_bh = bh, packed_home = home, packed_num = std::max(packed_num, num);
      turn.read(cos + row0 * p.D, sin + row0 * p.D, live, p.D);
      const int64_t end = up(open, VL), lde = std::max(padded, 4 * cells);
      for (int64_t g = 0; g < group; ++g) {
        const int64_t h = h_kv * group + g;
        const S* own = q_all + b * q_b + h * p.q_h + row0 * p.q_t;
        const float* map = maps + h * byte_map_size(p);
        // Rows of a head are too few for the processor to see a stream coming.
        if (g + 1 < group)
          for (int64_t t = 0; t < live; ++t)
            for (int64_t d = 0; d < p.D; d += 64 / sizeof(S)) __builtin_prefetch(own + p.q_h + t * p.q_t + d);
        const int rows = choice.choose(own, p.q_t, all_rows, p.one_in, chosen.data());
        for (int r = 0; r < rows; ++r) {
          const int64_t t = std::min(chosen[r] * p.row_tokens, live - 1);
          lasts[r] = std::min(start + (chosen[r] + 1) * p.row_tokens, p.first + p.num_rows) - 1;
          float* row = &plain[r * W];
          mean_row(own + t * p.q_t, p.q_t, p.row_tokens, live - t, p.D, &turn.own[t * p.D], &turn.other[t * p.D],
                   scratch.data(), row);
          P::pack_features(row, p.D, raw_query.data() + r * raw_cells);
        }
        for (int64_t c = 0; c < padded; c += NR)
          rows_by_panel(rows, int(W), plain.data(), W, map + c * W, encoded.data() + c, lde);
        measure_forced<P>(p, raw_query.data(), sinks.data() + bh * panel, near.data(), rows, num, lasts.data(), home, scale,
                          exact.data(), tops.data(), forced.data());
        std::fill_n(far.data(), end, -INF);
        const float* by_distance = bias + h * p.num_bias + home;
        for (int64_t j = 1; j < open; ++j) far[j] = by_distance[-j];
        vec high = splat(-INF);
        for (int64_t j = 0; j < end; j += VL) high = larger(load(far.data() + j), high);
        const float highest = has_nan(far.data(), end) ? NAN : peak(high);
        for (int r = 0; r < rows; ++r)
          how[r] = pack_byte_query(encoded.data() + r * lde, cells, forced[r] + flaws[bh], highest,
                                   query.data() + r * cells);
        auto sum_up = [&](auto c) {
          sum_panels<c>(rows, end, p.block, panels_all + bh * p.panel_h, query.data(), how.data(), far.data(), sums.data(),
                        columns);
        };
        if (cells == 4) sum_up(std::integral_constant<int, 4>{});
        if (cells == 8) sum_up(std::integral_constant<int, 8>{});
        if (cells == 12) sum_up(std::integral_constant<int, 12>{});
        if (cells == 16) sum_up(std::integral_constant<int, 16>{});
        is_odd |= best_byte_shares(rows, columns, open, how.data(), sums.data(), most.data(), out + g * out_h);
      }
    }
  }
  return is_odd;
}

#else

inline bool has_byte_scores(int64_t) { return false; }
inline int64_t byte_panel_size(const Scores&) { return 0; }
inline int64_t byte_map_size(const Scores&) { return 0; }
template <class S>
void pack_byte_panels(const Scores&, const S*, const float*, uint32_t*, float*, int) {}
inline void gather_byte_panels(const Scores&, const int32_t*, const uint32_t*, const float*, uint32_t*, float*, int) {}
inline void pack_byte_maps(const Scores&, const float*, const float*, float*) {}
template <class P, class S>
int byte_scores(const Scores&, int64_t, const S*, int64_t, const S*, int64_t, const uint32_t*, const float*,
                const float*, const float*, const float*, const float*, float, float*, int) {
  return 0;
}

#endif
