// Decode over the pages of a KV cache, scoring included: part of programs.cpp, whose vectors and rows it uses.
//
// Each row is one query token of one sequence. A page holds one key block: keys [D, block], so that lanes are tokens,
// values [block, D], and the features of its pools [pools, E]. Sink and own block are measured exactly, every other
// block is scored, and those whose share of the attention passes the row's threshold are read.

namespace {

struct Paged {
  int64_t rows, Hq, Hkv, D, E, block, pools, table_width, num_bias;
  int64_t q_row, q_h, f_row, f_h, k_page, k_h, v_page, v_h, p_page, p_h, o_row, o_h;  // strides
};

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

// What one thread needs for the heads of one KV group, `some` of which read a block.
struct PagedScratch {
  std::vector<float> q, s, o, top, total, fade, logits, far;
  std::vector<float> some_q, some_o, pool_scores;
  std::vector<int> some;
  std::vector<uint8_t> keep;
  PagedScratch(const Paged& p, int64_t heads)
      : q(heads * p.D), s(heads * p.block), o(heads * p.D), top(heads), total(heads), fade(heads),
        logits(heads * up(p.table_width, VL)), far(up(p.table_width, VL)), some_q(heads * p.D), some_o(heads * p.D),
        pool_scores(heads * std::max(p.pools, int64_t(1))), keep(heads * p.table_width) {}
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

// Marks in w.keep [heads, width] the blocks 1 .. own - 1 whose share passes; false where a score is NaN.
inline bool choose(const Paged& p, PagedScratch& w, int heads, int64_t own, const float* features, const float* pooled,
                   const int32_t* table, const float* cut, const float* bias, float log_pool) {
  const int64_t wide = up(p.table_width, VL), end = up(own, VL);
  std::fill(w.logits.begin(), w.logits.end(), -INF);
  for (int64_t j = 1; j < own; ++j) {
    const float* page = pooled + table[j] * p.p_page;
    const float* next = j + 1 < own ? pooled + table[j + 1] * p.p_page : page;
    by_rows<4>(heads, [&](int r, auto m) {
      dot_rows<m>(p.pools, p.E, features + r * p.f_h, p.f_h, page, p.E, &w.pool_scores[r * p.pools], p.pools, next,
                  p.E);
    });
    for (int g = 0; g < heads; ++g) {
      const float* s = &w.pool_scores[g * p.pools];
      float top = s[0], sum = 0.0f;
      for (int64_t i = 1; i < p.pools; ++i) top = std::fmax(top, s[i]);
      if (p.pools == 1) {
        w.logits[g * wide + j] = s[0] + log_pool;
        continue;
      }
      for (int64_t i = 0; i < p.pools; ++i) sum += std::exp(s[i] - top);
      w.logits[g * wide + j] = top + std::log(sum) + log_pool;
    }
  }
  for (int g = 0; g < heads; ++g) {
    float* row = &w.logits[g * wide];
    for (int64_t j = 1; j < own; ++j) row[j] += bias[g * p.num_bias + own - j];
    const float total = log_add(log_sum(row, end), w.top[g] + std::log(w.total[g]));
    if (std::isnan(total)) return false;
    for (int64_t j = 1; j < own; ++j) w.keep[g * p.table_width + j] = row[j] - total > cut[g];
  }
  return true;
}

// kept [rows, Hq] counts the blocks that were read; -1, and NaN for an output, where a score is NaN.
template <class S>
void decode_pages(const Paged& p, const S* q, const float* features, const S* keys, const S* values,
                  const float* pooled, const int32_t* table, const int64_t* positions, const float* cut,
                  const float* bias, S* out, int32_t* kept, float scale, float log_pool, int threads) {
  const int64_t group = p.Hq / p.Hkv;
  // Heads of a group share what they load, unless that would leave threads without work.
  const int64_t heads = p.rows * p.Hkv >= threads ? group : 1, tasks = p.rows * p.Hq / heads;
#pragma omp parallel num_threads(threads)
  {
    PagedScratch w(p, heads);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t row = task * heads / p.Hq, h0 = task * heads % p.Hq, h_kv = h0 / group;
      const int32_t* pages = table + row * p.table_width;
      const int64_t own = positions[row] / p.block, last = positions[row] % p.block + 1;
      const S *k0 = keys + h_kv * p.k_h, *v0 = values + h_kv * p.v_h;
      for (int64_t g = 0; g < heads; ++g)
        for (int64_t d = 0; d < p.D; ++d) w.q[g * p.D + d] = widen(q[row * p.q_row + (h0 + g) * p.q_h + d]) * scale;
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
          choose(p, w, int(heads), own, features + row * p.f_row + h0 * p.f_h, pooled + h_kv * p.p_h, pages,
                 cut + row * p.Hq + h0, bias + h0 * p.num_bias, log_pool);
      for (int64_t j = 1; j < own && is_sound; ++j) {
        w.some.clear();
        for (int g = 0; g < heads; ++g)
          if (w.keep[g * p.table_width + j]) w.some.push_back(g);
        if (!w.some.empty()) read(j, p.block, j + 1);
      }
      for (int g = 0; g < heads; ++g) {
        const float share = is_sound ? 1.0f / w.total[g] : NAN;
        int32_t num = own > 0 ? 2 : 1;
        for (int64_t j = 1; j < own; ++j) num += w.keep[g * p.table_width + j];
        kept[row * p.Hq + h0 + g] = is_sound ? num : -1;
        for (int64_t d = 0; d < p.D; ++d)
          narrow(w.o[g * p.D + d] * share, out + row * p.o_row + (h0 + g) * p.o_h + d);
      }
    }
  }
}

}  // namespace

extern "C" {

void sentei_decode_pages_f32(const Paged* p, const float* q, const float* features, const float* keys,
                             const float* values, const float* pooled, const int32_t* table, const int64_t* positions,
                             const float* cut, const float* bias, float* out, int32_t* kept, float scale,
                             float log_pool, int threads) {
  decode_pages(*p, q, features, keys, values, pooled, table, positions, cut, bias, out, kept, scale, log_pool,
               threads);
}
void sentei_decode_pages_bf16(const Paged* p, const uint16_t* q, const float* features, const uint16_t* keys,
                              const uint16_t* values, const float* pooled, const int32_t* table,
                              const int64_t* positions, const float* cut, const float* bias, uint16_t* out,
                              int32_t* kept, float scale, float log_pool, int threads) {
  decode_pages(*p, q, features, keys, values, pooled, table, positions, cut, bias, out, kept, scale, log_pool,
               threads);
}
}
