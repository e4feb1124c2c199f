// Scores of single query tokens against the pages of a KV cache: a part of paged.hpp, which includes it in its
// namespace. Features of a page's pools are floats, or bytes where keys are single tokens in few dimensions.
//
// A byte is a feature in steps of its page and dimension plus 128, laid [cell of four dimensions][token]: a function of
// the page's keys alone, so that pages may be shared, and no answer depends on what else its sequence holds.

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

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// sums[M] of exp(logit - reference) over the tokens of one page; `next` is the page that is scored after it.
template <int C, int M>
inline void sum_page(int64_t block, const uint32_t* page, const uint32_t* next, const float* steps, const float* x,
                     const float* reference, float* sums, int64_t stride) {
  alignas(64) uint32_t query[M * C];
  __m512 scale[M], shift[M], total[M];
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) {
    __m512 y[C / 4], top = _mm512_setzero_ps(), all = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < C / 4; ++i) {
      y[i] = _mm512_mul_ps(_mm512_loadu_ps(x + r * 4 * C + i * VL), _mm512_loadu_ps(steps + i * VL));
      top = _mm512_max_ps(_mm512_abs_ps(y[i]), top);
      all = _mm512_add_ps(all, _mm512_abs_ps(y[i]));
    }
    const float size = std::fmax(peak((vec)top), 1e-20f), step = size / 127.0f;
    __m512i bytes = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < C / 4; ++i) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(y[i], _mm512_set1_ps(127.0f / size)));
      bytes = _mm512_add_epi32(bytes, whole);
      _mm_store_si128((__m128i*)(query + r * C) + i, _mm512_cvtepi32_epi8(whole));
    }
    const bool is_sound = std::isfinite(sum((vec)all));
    scale[r] = _mm512_set1_ps(is_sound ? step : NAN);
    shift[r] = _mm512_set1_ps(-step * 128.0f * float(_mm512_reduce_add_epi32(bytes)) - reference[r]);
    total[r] = _mm512_setzero_ps();
  }
  for (int64_t t = 0; t < block; t += VL) {
    __m512i s[M];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) s[r] = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const __m512i cell = _mm512_loadu_si512(page + c * block + t);
      ask_for(next + c * block + t);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) s[r] = _mm512_dpbusd_epi32(s[r], cell, _mm512_set1_epi32(int(query[r * C + c])));
    }
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
      const vec logit = (vec)_mm512_fmadd_ps(_mm512_cvtepi32_ps(s[r]), scale[r], shift[r]);
      total[r] += (__m512)exp_of(logit > 80.0f ? splat(80.0f) : logit);  // 64 of e^80 are finite
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) sums[r * stride] = sum((vec)total[r]);
}

template <int C>
inline void sum_page_heads(int heads, int64_t block, const uint32_t* page, const uint32_t* next, const float* steps,
                           const float* x, const float* reference, float* sums, int64_t stride) {
  by_rows<4>(heads, [&](int r, auto m) {
    sum_page<C, m>(block, page, next, steps, x + r * 4 * C, reference + r, sums + r * stride, stride);
  });
}

inline void sum_page_bytes(const Paged& p, int heads, const uint32_t* page, const uint32_t* next, const float* steps,
                           const float* x, const float* reference, float* sums, int64_t stride) {
  auto with = [&](auto c) { sum_page_heads<c>(heads, p.block, page, next, steps, x, reference, sums, stride); };
  if (p.cells == 4) with(std::integral_constant<int, 4>{});
  if (p.cells == 8) with(std::integral_constant<int, 8>{});
  if (p.cells == 12) with(std::integral_constant<int, 12>{});
  if (p.cells == 16) with(std::integral_constant<int, 16>{});
}

#else

inline void sum_page_bytes(const Paged&, int, const uint32_t*, const uint32_t*, const float*, const float*,
                           const float*, float*, int64_t) {}

#endif

// Log mass, without the bias, of pages 1 .. own - 1 of a sequence for some heads: logits [heads, wide]; `forced` [heads]
// is what sink and own block hold. `pooled` are floats [pools, E] by page, or with cells `bytes` [cells, block] and
// `steps` [E].
inline void score_pages(const Paged& p, int heads, int64_t own, const float* x, const float* pooled,
                        const uint32_t* bytes, const float* steps, const int32_t* table, const float* forced,
                        float log_pool, float* pool_scores, float* logits, int64_t wide) {
  for (int64_t j = 1; j < own; ++j) {
    const int64_t page = table[j], then = table[j + 1 < own ? j + 1 : j];
    if (p.cells > 0) {
      const int64_t size = p.Hkv * p.cells * p.block;
      sum_page_bytes(p, heads, bytes + page * size, bytes + then * size, steps + page * p.Hkv * p.E, x, forced,
                     logits + j, wide);
      continue;
    }
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
      logits[g * wide + j] = (p.pools == 1 ? s[0] : top + std::log(all)) + log_pool;
    }
  }
  if (p.cells == 0) return;
  for (int g = 0; g < heads; ++g)
    for (int64_t j = 0; j < wide; j += VL) {  // what lies outside 1 .. own - 1 is overwritten by the caller
      const vec sums = load(logits + g * wide + j);
      store(logits + g * wide + j, log_of(sums < 1e-37f ? splat(1e-37f) : sums) + forced[g]);  // NaN stays NaN
    }
}

// A factor as the tensors' own type would hold it.
inline float round_as(float x, const float*) { return x; }
inline float round_as(float x, const uint16_t*) {
  uint16_t half;
  narrow(x, &half);
  return widen(half);
}

// Features of full pages, `blocks` [n] says where each lies in its sequence: pooled [P, Hkv, pools, stride], and with
// cells also bytes [P, Hkv, cells, block] in steps [P, Hkv, E]. `maps` are [Hkv, D or 2 D, columns].
template <class S, class F>
void encode_pages(const Paged& p, int64_t n, const int64_t* pages, const int64_t* blocks, const S* keys,
                  const float* maps, const float* cos, const float* sin, int64_t stride, F* pooled, uint32_t* bytes,
                  float* steps, int threads) {
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
    std::vector<float> rows(p.block * p.D), plain(p.D), in(p.pools * 2 * p.D), out(p.pools * wide), top(p.E);
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
      F* to = pooled + at * p.pools * stride;
      for (int64_t j = 0; j < p.pools; ++j) {
        for (int64_t d = 0; d < own; ++d) narrow(in[j * 2 * p.D + d], to + j * stride + d);
        for (int64_t c = 0; own + c < stride; ++c)
          narrow(out[j * wide + c] = round_as(out[j * wide + c], keys), to + j * stride + own + c);
      }
      if (p.cells == 0) continue;
      std::fill(top.begin(), top.end(), 1e-20f);
      for (int64_t t = 0; t < p.block; ++t)
        for (int64_t c = 0; c < columns; ++c) {  // NaN is kept
          const float size = std::fabs(out[t * wide + c]);
          top[c] = size <= top[c] || std::isnan(top[c]) ? top[c] : size;
        }
      for (int64_t c = 0; c < columns; ++c) steps[at * p.E + c] = top[c] / 127.0f;
      uint8_t* cell = (uint8_t*)(bytes + at * p.cells * p.block);
      for (int64_t t = 0; t < p.block; ++t)
        for (int64_t c = 0; c < columns; ++c) {
          const float unit = out[t * wide + c] * (127.0f / top[c]);
          const bool is_number = std::fabs(unit) <= 127.5f;
          cell[(c / 4 * p.block + t) * 4 + c % 4] = is_number ? uint8_t(int(std::nearbyint(unit)) + 128) : 128;
        }
    }
  }
}
