// Scores of single query tokens against the pages of a KV cache: a part of paged.hpp, which includes it in its
// namespace. Features of a page's pools are floats, or bytes where keys are single tokens in few dimensions.
//
// A byte is a feature in the scorer's steps plus 128, as in byte_scores.h, laid [cell of four dimensions][token]: a
// function of its key alone, so that pages may be shared, and no answer depends on what else its sequence holds.

struct Paged {
  int64_t rows, Hq, Hkv, D, E, is_residual, block, pools, cells, table_width, num_bias;
  int64_t q_t, q_h, k_page, k_h, v_page, v_h, o_t, o_h;  // strides; features are contiguous
};

// Features of one query token's `heads` heads: x [heads, E] from q, maps [heads, D or 2 D, columns], gains [heads].
template <class S>
void encode_token(const Paged& p, int64_t heads, const S* q, const float* cos, const float* sin, const float* maps,
                  const float* gains, float* row, float* x) {
  const int64_t own = p.is_residual ? p.D : 0, columns = p.E - own, W = p.is_residual ? p.D : 2 * p.D;
  for (int64_t g = 0; g < heads; ++g) {
    float *plain = row + p.D, *to = x + g * p.E;
    for (int64_t d = 0; d < p.D; ++d) row[d] = widen(q[g * p.q_h + d]);
    unrotate(row, cos, sin, p.D, plain);
    if (p.is_residual) {
      const float norm = 1.0f / std::sqrt(square(plain, p.D) / float(p.D) + 1e-6f);
      for (int64_t d = 0; d < p.D; ++d) plain[d] *= norm;
      for (int64_t d = 0; d < p.D; ++d) to[d] = row[d] * gains[g];
    }
    const float *from = p.is_residual ? plain : row, *map = maps + g * W * columns;
    for (int64_t c = 0; c < columns; c += VL) {
      vec sum{};
      for (int64_t d = 0; d < W; ++d) sum += from[d] * load(map + d * columns + c);
      store(to + own + c, sum);
    }
  }
}

#if HAS_BYTE_PRODUCTS

// sums[M] over the tokens of one page of what `sum_panel` sums up, `bias` [M]; `next` is the page that is scored after it.
template <int C, int M>
inline void sum_page(int64_t block, const uint32_t* page, const uint32_t* next, const uint32_t* query,
                     const ByteRow* rows, const float* bias, float* sums, int64_t stride) {
  vec total[M];
  ivec shift[M], start[M];
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) {
    shift[r] = rows[r].shift + ivec{};
    start[r] = exponents_at_zero(rows[r], splat(bias[r]));
    total[r] = vec{};
  }
  for (int64_t t = 0; t < block; t += VL) {
    ivec x[M];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) x[r] = start[r];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const ivec cell = load_cells(page + c * block + t);
      ask_for(next + c * block + t);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) x[r] = add_products(x[r], cell, int32_t(query[r * C + c]) + ivec{});
    }
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) total[r] += power_of<false>(x[r], shift[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) sums[r * stride] = sum(total[r]);
}

template <int C>
inline void sum_pages(const Paged& p, int heads, int64_t own, const uint32_t* bytes, const float* flaws,
                      const int32_t* table, const uint32_t* query, const ByteRow* rows, const float* bias, float* sums,
                      int64_t wide) {
  const int64_t size = p.Hkv * C * p.block;
  float near[4];
  for (int64_t j = 1; j < own; ++j) {
    const int64_t page = table[j], then = table[j + 1 < own ? j + 1 : j];
    by_rows<4>(heads, [&](int r, auto m) {
      for (int i = 0; i < m; ++i) near[i] = bias[(r + i) * p.num_bias + own - j];
      sum_page<C, m>(p.block, bytes + page * size, bytes + then * size, query + r * C, rows + r, near,
                     sums + r * wide + j, wide);
      for (int i = 0; i < m; ++i) sums[(r + i) * wide + j] += flaws[page * p.Hkv];
    });
  }
}

// Log mass, bias included, of pages 1 .. own - 1 for some heads, from features x [heads, E] in steps of the bytes.
inline void score_pages_bytes(const Paged& p, int heads, int64_t own, const float* x, const uint32_t* bytes,
                              const float* flaws, const int32_t* table, const float* bias, const float* forced,
                              uint32_t* query, ByteRow* rows, float* logits, int64_t wide) {
  for (int g = 0; g < heads; ++g) {
    float highest = -INF;
    for (int64_t j = 1; j < own && highest == highest; ++j) {
      const float far = bias[g * p.num_bias + own - j];
      if (!(far <= highest)) highest = far;  // NaN is kept
    }
    rows[g] = pack_byte_query(x + g * p.E, p.cells, forced[g], highest, query + g * p.cells);
  }
  auto with = [&](auto c) { sum_pages<c>(p, heads, own, bytes, flaws, table, query, rows, bias, logits, wide); };
  if (p.cells == 4) with(std::integral_constant<int, 4>{});
  if (p.cells == 8) with(std::integral_constant<int, 8>{});
  if (p.cells == 12) with(std::integral_constant<int, 12>{});
  if (p.cells == 16) with(std::integral_constant<int, 16>{});
  for (int g = 0; g < heads; ++g)
    for (int64_t j = 0; j < wide; j += VL) {  // what lies outside 1 .. own - 1 is overwritten by the caller
      const vec sums = load(logits + g * wide + j);
      store(logits + g * wide + j, log_of(sums < 1e-37f ? splat(1e-37f) : sums) + rows[g].reference);  // NaN is kept
    }
}

#else

inline void score_pages_bytes(const Paged&, int, int64_t, const float*, const uint32_t*, const float*, const int32_t*,
                              const float*, const float*, uint32_t*, ByteRow*, float*, int64_t) {}

#endif

// The same from features of floats: pooled [P, Hkv, pools, E].
inline void score_pages_floats(const Paged& p, int heads, int64_t own, const float* x, const float* pooled,
                               const int32_t* table, const float* bias, float log_pool, float* pool_scores,
                               float* logits, int64_t wide) {
  for (int64_t j = 1; j < own; ++j) {
    const int64_t page = table[j], then = table[j + 1 < own ? j + 1 : j];
    const int64_t size = p.Hkv * p.pools * p.E;
    const float *features = pooled + page * size, *next = pooled + then * size;
    by_rows<4>(heads, [&](int r, auto m) {
      dot_rows<m>(p.pools, p.E, x + r * p.E, p.E, features, p.E, pool_scores + r * p.pools, p.pools, next, p.E);
    });
    for (int g = 0; g < heads; ++g) {
      const float* s = pool_scores + g * p.pools;
      float top = s[0], all = 0.0f;
      for (int64_t i = 1; i < p.pools; ++i) top = std::fmax(top, s[i]);
      for (int64_t i = 0; i < p.pools; ++i) all += std::exp(s[i] - top);
      logits[g * wide + j] = (p.pools == 1 ? s[0] : top + std::log(all)) + log_pool + bias[g * p.num_bias + own - j];
    }
  }
}

// A factor as the tensors' own type would hold it.
inline float round_as(float x, const float*) { return x; }
inline float round_as(float x, const uint16_t*) {
  uint16_t half;
  narrow(x, &half);
  return widen(half);
}

// Features of full pages, `blocks` [n] says where each lies in its sequence: pooled [P, Hkv, pools, E], or with cells
// bytes [P, Hkv, cells, block] in steps of which inverse_steps [Hkv, E] are the inverse, and flaws [P, Hkv], NaN where a
// feature is no number. `maps` are [Hkv, D or 2 D, columns].
template <class S>
void encode_pages(const Paged& p, int64_t n, const int64_t* pages, const int64_t* blocks, const S* keys,
                  const float* maps, const float* cos, const float* sin, const float* inverse_steps, float* pooled,
                  uint32_t* bytes, float* flaws, int threads) {
  const int64_t own = p.is_residual ? p.D : 0, columns = p.E - own, W = p.is_residual ? p.D : 2 * p.D;
  const int64_t size = p.block / p.pools, wide = up(columns, NR);
  std::vector<float> packed(p.Hkv * wide * W);  // [column panel][W][NR]
  // As elsewhere: means are tensors of the keys' type on their way, single keys are not.
  auto rounded = [&](float x) { return size > 1 ? round_as(x, keys) : x; };
  for (int64_t h = 0; h < p.Hkv; ++h)
    for (int64_t d = 0; d < W; ++d)
      for (int64_t c = 0; c < wide; ++c)
        packed[(h * wide + c / NR * NR) * W + d * NR + c % NR] =
            c < columns ? rounded(maps[(h * W + d) * columns + c]) : 0.0f;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> rows(p.block * p.D), plain(p.D), in(p.pools * 2 * p.D), out(p.pools * wide);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < n * p.Hkv; ++task) {
      const int64_t i = task / p.Hkv, h = task % p.Hkv, at = pages[i] * p.Hkv + h, first = blocks[i] * p.block;
      const S* page = keys + pages[i] * p.k_page + h * p.k_h;
      for (int64_t d = 0; d < p.D; ++d)
        for (int64_t t = 0; t < p.block; ++t) rows[t * p.D + d] = widen(page[d * p.block + t]);
      std::fill(in.begin(), in.end(), 0.0f);
      for (int64_t t = 0; t < p.block; ++t) {
        float *mean = &in[t / size * 2 * p.D], *mean_plain = mean + p.D;
        unrotate(&rows[t * p.D], cos + (first + t) * p.D, sin + (first + t) * p.D, p.D, plain.data());
        for (int64_t d = 0; d < p.D; ++d) mean[d] += rows[t * p.D + d];
        for (int64_t d = 0; d < p.D; ++d) mean_plain[d] += plain[d];
      }
      for (int64_t j = 0; j < p.pools; ++j) {
        float *mean = &in[j * 2 * p.D], *mean_plain = mean + p.D;
        for (int64_t d = 0; d < 2 * p.D; ++d) mean[d] = rounded(mean[d] / float(size));
        if (!p.is_residual) continue;
        const float norm = 1.0f / std::sqrt(square(mean_plain, p.D) / float(p.D) + 1e-6f);
        for (int64_t d = 0; d < p.D; ++d) mean_plain[d] = rounded(mean_plain[d] * norm);
      }
      for (int64_t c = 0; c < wide; c += NR)
        rows_by_panel(int(p.pools), int(W), in.data() + own, 2 * p.D, &packed[(h * wide + c) * W], &out[c], wide);
      for (int64_t j = 0; j < p.pools * wide; ++j) out[j] = round_as(out[j], keys);
      if (p.cells == 0) {
        float* to = pooled + at * p.pools * p.E;
        for (int64_t j = 0; j < p.pools; ++j) {
          std::copy_n(&in[j * 2 * p.D], own, to + j * p.E);
          std::copy_n(&out[j * wide], columns, to + j * p.E + own);
        }
        continue;
      }
      uint8_t* cell = (uint8_t*)(bytes + at * p.cells * p.block);
      flaws[at] = 0.0f;
      for (int64_t t = 0; t < p.block; ++t)
        for (int64_t c = 0; c < columns; ++c)
          cell[(c / 4 * p.block + t) * 4 + c % 4] = to_byte(out[t * wide + c], inverse_steps[h * p.E + c], flaws + at);
    }
  }
}
