// Decode over the pages of a KV cache, scoring included: part of programs.cpp, whose vectors and rows it uses.
//
// A page holds one key block: keys [D, block], so that lanes are tokens, and values [block, D]. In decode each row is
// one query token of one sequence: sink and own block are measured exactly, every other block is scored, and those whose
// share of the attention passes the row's threshold are read. Prefill reads the blocks of a mask.

namespace {

#include "page_scores.h"

// s[M, W * VL] = q[M, D] * keys[D, .], lanes are tokens
template <int M, int W, class S>
inline void dot_dims(int64_t D, const float* q, const S* keys, int64_t ldk, float* s, int64_t lds) {
  vec x[M][W] = {};
  for (int64_t d = 0; d < D; ++d) {
    vec key[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) key[w] = load_wide(keys + d * ldk + w * VL);
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) x[r][w] += q[r * D + d] * key[w];
  }
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(s + r * lds + w * VL, x[r][w]);
}

// Where a query token lies in the batch, which sequence of the tables is its own, and which row of the thresholds.
struct PagedRow {
  int64_t token, sequence, position, cut;
};

// What one thread needs for the heads of one KV group, `some` of which read a block.
struct PagedScratch {
  std::vector<float> q, s, o, top, total, fade, logits, features, row, forced;
  std::vector<float> some_q, some_o, pool_scores;
  std::vector<int> some;
  std::vector<uint8_t> keep;
  std::vector<int64_t> read;  // pages that some head wants
  std::vector<uint32_t> query;
  std::vector<ByteRow> byte_rows;
  PagedScratch(const Paged& p, int64_t heads)
      : q(heads * p.D), s(heads * p.block), o(heads * p.D), top(heads), total(heads), fade(heads),
        logits(heads * up(p.table_width, VL)), features(heads * p.E), row(2 * p.D), forced(heads), some_q(heads * p.D),
        some_o(heads * p.D), pool_scores(heads * std::max(p.pools, int64_t(1))), keep(heads * p.table_width),
        query(heads * p.cells), byte_rows(heads) {}
};

// Online softmax of the heads in w.some over the first n tokens of one page.
template <class S>
void read_page(const Paged& p, PagedScratch& w, const S* keys, const S* values, int64_t n, const S* next) {
  const int num = int(w.some.size());
  for (int i = 0; i < num; ++i) {
    std::memcpy(&w.some_q[i * p.D], &w.q[w.some[i] * p.D], sizeof(float) * p.D);
    std::memcpy(&w.some_o[i * p.D], &w.o[w.some[i] * p.D], sizeof(float) * p.D);
  }
  by_rows<4>(num, [&](int r, auto m) {
    int64_t t = 0;
    for (; t + 4 * VL <= p.block; t += 4 * VL)
      dot_dims<m, 4>(p.D, &w.some_q[r * p.D], keys + t, p.block, &w.s[r * p.block + t], p.block);
    for (; t < p.block; t += VL)
      dot_dims<m, 1>(p.D, &w.some_q[r * p.D], keys + t, p.block, &w.s[r * p.block + t], p.block);
  });
  for (int i = 0; i < num; ++i) {
    const int g = w.some[i];
    float* s = &w.s[i * p.block];
    std::fill(s + n, s + p.block, -INF);
    const float high = std::fmax(w.top[g], max_row(s, int(p.block)));
    w.fade[i] = 1.0f;
    if (high == -INF) {
      w.total[g] += std::isnan(nothing(s, n)) ? NAN : 0.0f;
      std::fill(s, s + p.block, 0.0f);
      continue;
    }
    w.fade[i] = std::exp(w.top[g] - high);
    w.total[g] = w.total[g] * w.fade[i] + exp_row(s, int(p.block), high);
    w.top[g] = high;
  }
  by_rows<4>(num, [&](int r, auto m) {
    add_rows<m>(n, p.D, &w.s[r * p.block], p.block, values, p.D, &w.fade[r], &w.some_o[r * p.D], p.D, next, p.D);
  });
  for (int i = 0; i < num; ++i) std::memcpy(&w.o[w.some[i] * p.D], &w.some_o[i * p.D], sizeof(float) * p.D);
}

// Marks in w.keep [heads, width] the blocks 1 .. own - 1 whose share passes, and lists them in w.read; false where a
// score is NaN.
inline bool choose(const Paged& p, PagedScratch& w, int heads, int64_t own, const float* pooled, const uint32_t* bytes,
                   const float* flaws, const int32_t* table, const float* cut, const float* bias, float log_pool) {
  const int64_t wide = up(p.table_width, VL), end = up(own, VL);
  w.read.clear();
  if (own < 2) return true;
  std::fill(w.logits.begin(), w.logits.end(), -INF);
  for (int g = 0; g < heads; ++g) w.forced[g] = w.top[g] + std::log(w.total[g]);
  if (p.cells > 0)
    score_pages_bytes(p, heads, own, w.features.data(), bytes, flaws, table, bias, w.forced.data(), w.query.data(),
                      w.byte_rows.data(), w.logits.data(), wide);
  else
    score_pages_floats(p, heads, own, w.features.data(), pooled, table, bias, log_pool, w.pool_scores.data(),
                       w.logits.data(), wide);
  for (int g = 0; g < heads; ++g) {
    float* row = &w.logits[g * wide];
    row[0] = -INF;
    for (int64_t j = own; j < end; ++j) row[j] = -INF;
    const float total = log_add(log_sum(row, end), w.forced[g]);
    if (std::isnan(total)) return false;
    for (int64_t j = 1; j < own; ++j) w.keep[g * p.table_width + j] = row[j] - total > cut[g];
  }
  for (int64_t j = 1; j < own; ++j)
    for (int g = 0; g < heads; ++g)
      if (w.keep[g * p.table_width + j]) {
        w.read.push_back(j);
        break;
      }
  return true;
}

// kept [rows, Hq] counts the blocks that were read, lse [rows, Hq] is of what they hold; -1 and NaN, also for an output,
// where a score is NaN.
template <class S>
void decode_pages(const Paged& p, const PagedRow* rows, const S* q, const S* keys, const S* values,
                  const float* pooled, const uint32_t* bytes, const float* flaws, const int32_t* tables,
                  const float* cuts, const float* maps, const float* gains, const float* cos, const float* sin,
                  const float* bias, S* out, float* lse, int32_t* kept, float scale, float log_pool, int threads) {
  const int64_t group = p.Hq / p.Hkv, map = (p.is_residual ? p.D : 2 * p.D) * (p.E - (p.is_residual ? p.D : 0));
  // Heads of a group share what they load, unless that would leave threads without work.
  const int64_t heads = p.rows * p.Hkv >= threads ? group : 1, tasks = p.rows * p.Hq / heads;
#pragma omp parallel num_threads(threads)
  {
    PagedScratch w(p, heads);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t i = task * heads / p.Hq, h0 = task * heads % p.Hq, h_kv = h0 / group;
      const PagedRow& row = rows[i];
      const int32_t* pages = tables + row.sequence * p.table_width;
      const int64_t own = row.position / p.block, last = row.position % p.block + 1;
      const S *k0 = keys + h_kv * p.k_h, *v0 = values + h_kv * p.v_h, *q0 = q + row.token * p.q_t + h0 * p.q_h;
      for (int64_t g = 0; g < heads; ++g)
        for (int64_t d = 0; d < p.D; ++d) w.q[g * p.D + d] = widen(q0[g * p.q_h + d]) * scale;
      if (own > 1)
        encode_token(p, heads, q0, cos + row.position * p.D, sin + row.position * p.D, maps + h0 * map, gains + h0,
                     w.row.data(), w.features.data());
      std::fill(w.o.begin(), w.o.end(), 0.0f);
      std::fill(w.top.begin(), w.top.end(), -INF);
      std::fill(w.total.begin(), w.total.end(), 0.0f);
      std::fill(w.keep.begin(), w.keep.end(), 0);
      w.some.clear();
      for (int g = 0; g < heads; ++g) w.some.push_back(g);
      auto read = [&](int64_t j, int64_t n, int64_t then) {
        read_page(p, w, k0 + pages[j] * p.k_page, v0 + pages[j] * p.v_page, n, k0 + pages[then] * p.k_page);
      };
      if (own > 0) read(0, p.block, own);
      read(own, last, own);
      const bool is_sound =
          choose(p, w, int(heads), own, pooled + h_kv * p.pools * p.E, bytes + h_kv * p.cells * p.block,
                 flaws + h_kv, pages, cuts + row.cut * p.Hq + h0, bias + h0 * p.num_bias, log_pool);
      for (size_t n = 0; n < w.read.size() && is_sound; ++n) {
        const int64_t j = w.read[n];
        w.some.clear();
        for (int g = 0; g < heads; ++g)
          if (w.keep[g * p.table_width + j]) w.some.push_back(g);
        read(j, p.block, n + 1 < w.read.size() ? w.read[n + 1] : j);
      }
      for (int g = 0; g < heads; ++g) {
        const float share = is_sound ? 1.0f / w.total[g] : NAN;
        lse[i * p.Hq + h0 + g] = is_sound ? w.top[g] + std::log(w.total[g]) : NAN;
        int32_t num = own > 0 ? 2 : 1;
        for (int64_t j = 1; j < own; ++j) num += w.keep[g * p.table_width + j];
        kept[i * p.Hq + h0 + g] = is_sound ? num : -1;
        for (int64_t d = 0; d < p.D; ++d)
          narrow(w.o[g * p.D + d] * share, out + row.token * p.o_t + (h0 + g) * p.o_h + d);
      }
    }
  }
}

// NR tokens of a page from token `at` on, `live` of them written: keys [D, block] and values [block, D] to the panels
// of a prefill.
template <class P, class S>
void pack_page(const Prefill& p, const S* key, const S* value, int64_t at, int64_t live, typename P::Cell* keys,
               typename P::Cell* values, int64_t apart) {
  const int64_t block = p.block_k;
  if (live < NR) {  // the end of a sequence: what lies past it may be anything
    S k[NR * 256], v[NR * 256];
    std::memset(k, 0, sizeof(S) * NR * p.D);
    std::memset(v, 0, sizeof(S) * NR * p.D);
    for (int64_t j = 0; j < live; ++j)
      for (int64_t d = 0; d < p.D; ++d) {
        k[j * p.D + d] = key[d * block + at + j];
        v[j * p.D + d] = value[(at + j) * p.D + d];
      }
    P::pack_key_panel(k, p.D, 0, std::max(live, int64_t(0)), p.D, keys);
    P::pack_value_rows(v, p.D, 0, std::max(live, int64_t(0)), p.D, values, apart);
    return;
  }
  if constexpr (P::PER == 1) {
    for (int64_t d = 0; d < p.D; ++d)
      for (int64_t j = 0; j < NR; j += VL) store(keys + d * NR + j, load_wide(key + d * block + at + j));
    for (int64_t d = 0; d < p.D; d += NR)
      for (int64_t j = 0; j < NR; ++j)
        for (int64_t c = 0; c < NR; c += VL)
          store(values + d / NR * apart + j * NR + c, load_wide(value + (at + j) * p.D + d + c));
  } else {
    auto pair = [](const S* a, const S* b, typename P::Cell* to) {
      halves x, y;
      std::memcpy(&x, a, sizeof x);
      std::memcpy(&y, b, sizeof y);
      const words both = __builtin_convertvector(x, words) | __builtin_convertvector(y, words) << 16;
      std::memcpy(to, &both, sizeof both);
    };
    for (int64_t d = 0; d < p.D; d += 2)
      for (int64_t j = 0; j < NR; j += VL)
        pair(key + d * block + at + j, key + (d + 1) * block + at + j, keys + d / 2 * NR + j);
    for (int64_t d = 0; d < p.D; d += NR)
      for (int64_t j = 0; j < NR; j += 2)
        for (int64_t c = 0; c < NR; c += VL)
          pair(value + (at + j) * p.D + d + c, value + (at + j + 1) * p.D + d + c,
               values + d / NR * apart + j / 2 * NR + c);
  }
}

// A prompt's rows against selected blocks of one sequence's pages: k_b and v_b are from page to page, B is 1.
template <class P, class S>
void prefill_pages(const Prefill& p, const S* q, const S* k, const S* v, const int32_t* table, const int32_t* counts,
                   const int32_t* indices, S* out, float* lse, float scale, int threads) {
  auto pack = [&](int64_t, int64_t h, int64_t t, auto* keys, auto* values, int64_t apart) {
    const int64_t page = table[t / p.block_k];
    pack_page<P>(p, k + page * p.k_b + h * p.k_h, v + page * p.v_b + h * p.v_h, t % p.block_k, p.Tk - t, keys, values,
                 apart);
  };
  prefill_packed<P>(p, q, counts, indices, out, lse, scale, threads, pack);
}

}  // namespace

extern "C" {

#define SENTEI_DECODE_PAGES(NAME, S)                                                                                  \
  void NAME(const Paged* p, const int64_t* rows, const S* q, const S* keys, const S* values, const float* pooled,     \
            const uint32_t* bytes, const float* flaws, const int32_t* tables, const float* cuts, const float* maps,   \
            const float* gains, const float* cos, const float* sin, const float* bias, S* out, float* lse,            \
            int32_t* kept, float scale, float log_pool, int threads) {                                                \
    decode_pages(*p, (const PagedRow*)rows, q, keys, values, pooled, bytes, flaws, tables, cuts, maps, gains, cos,    \
                 sin, bias, out, lse, kept, scale, log_pool, threads);                                                \
  }
SENTEI_DECODE_PAGES(sentei_decode_pages_f32, float)
SENTEI_DECODE_PAGES(sentei_decode_pages_bf16, uint16_t)

#define SENTEI_ENCODE_PAGES(NAME, S)                                                                                  \
  void NAME(const Paged* p, int64_t n, const int64_t* pages, const int64_t* blocks, const S* keys, const float* maps, \
            const float* cos, const float* sin, const float* inverse_steps, float* pooled, uint32_t* bytes,           \
            float* flaws, int threads) {                                                                              \
    encode_pages(*p, n, pages, blocks, keys, maps, cos, sin, inverse_steps, pooled, bytes, flaws, threads);           \
  }
SENTEI_ENCODE_PAGES(sentei_encode_pages_f32, float)
SENTEI_ENCODE_PAGES(sentei_encode_pages_bf16, uint16_t)

void sentei_prefill_pages_f32(const Prefill* p, const float* q, const float* k, const float* v, const int32_t* table,
                              const int32_t* counts, const int32_t* indices, float* out, float* lse, float scale,
                              int threads) {
  prefill_pages<FullCells>(*p, q, k, v, table, counts, indices, out, lse, scale, threads);
}
void sentei_prefill_pages_bf16(const Prefill* p, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                               const int32_t* table, const int32_t* counts, const int32_t* indices, uint16_t* out,
                               float* lse, float scale, int threads) {
#if defined(__AVX512BF16__)
  prefill_pages<PairCells>(*p, q, k, v, table, counts, indices, out, lse, scale, threads);
#else
  prefill_pages<FullCells>(*p, q, k, v, table, counts, indices, out, lse, scale, threads);
#endif
}
}
