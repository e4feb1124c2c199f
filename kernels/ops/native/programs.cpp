// Sentei's own CPU programs: block-sparse attention, block mass, block scores, selection. Built by build.py.
//
// One scheme throughout: keys are packed once into panels of NR keys, [panel][dim][NR], so that a tile of MR rows
// times NR keys stays in registers while `dim` runs; values are packed into column panels, [column][key][NR].
// Sums are fp32. Factors are fp32 too, but in prefill over bf16 tensors on processors that multiply pairs of bf16
// (AVX512-BF16). Vectors are the compiler's own type, so the same text serves AVX2, AVX-512 and NEON.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 8;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 8;
#endif
// Bytes are multiplied where vectors are whole registers of AVX2 or AVX-512.
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define HAS_BYTE_PRODUCTS 1
#else
#define HAS_BYTE_PRODUCTS 0
#endif
constexpr int NR = 2 * VL;
// Keys per softmax step: MR rows of scores and one column panel of values stay in a 32 KiB cache.
constexpr int CHUNK = 256;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));

inline vec load(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
inline vec splat(float x) { return x - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// Folds the lanes of a vector into one number, half onto half.
template <int N, class V, class F>
inline float fold(const V& x, F f) {
  if constexpr (N == 4) {
    return f(f(x[0], x[2]), f(x[1], x[3]));
  } else {
    typedef float half __attribute__((vector_size(N * 2)));
    half a, b;
    std::memcpy(&a, &x, sizeof a);
    std::memcpy(&b, (const char*)&x + sizeof a, sizeof b);
    return fold<N / 2>(f(a, b), f);
  }
}
#if defined(__AVX512F__)
// In registers: the compiler's way through memory took a fifth of dense attention's time.
inline float sum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
inline float peak(vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float sum(vec x) {
  return fold<VL>(x, [](auto a, auto b) { return a + b; });
}
inline float peak(vec x) {
  return fold<VL>(x, [](auto a, auto b) { return a > b ? a : b; });
}
#endif

// 2^n times a polynomial of degree 6 on [-1/2, 1/2]: relative error below 2e-7. Below -87 it gives 0.
inline vec exp_of(vec x) {
  const vec t = larger(x, splat(-87.0f)) * 1.44269504f;
  const vec magic = splat(12582912.0f);
  const vec shifted = t + magic;
  const vec n = shifted - magic;
  const vec f = t - n;
  vec p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const ivec power = ((ivec)shifted - 0x4B400000 + 127) << 23;
  const vec y = p * (vec)power;
  return x < -87.0f ? vec{} : (x >= -87.0f ? y : x);  // NaN stays NaN
}

// Mantissa in [sqrt(1/2), sqrt(2)) by the series of atanh; x must be positive and normal.
inline vec log_of(vec x) {
  const ivec bits = (ivec)x;
  const ivec e = (bits - 0x3F3504F3) >> 23;
  const vec m = (vec)(bits - (e << 23));
  const vec z = (m - 1.0f) / (m + 1.0f), w = z * z;
  vec p = splat(0.22222222f);
  p = p * w + 0.28571429f;
  p = p * w + 0.4f;
  p = p * w + 0.66666667f;
  p = p * w + 2.0f;
  const vec y = __builtin_convertvector(e, vec) * 0.69314718f + z * p;
  return x == x ? y : x;  // NaN stays NaN
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {  // bfloat16
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline void narrow(float x, float* y) { *y = x; }
inline void narrow(float x, uint16_t* y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *y = std::isnan(x) ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// How factors lie in panels: a cell holds one number, or two neighbours along the axis that is summed over.
struct Full {
  typedef float Cell;
  static constexpr int PER = 1, MR = ::MR;
  static vec load_cells(const Cell* x) { return load(x); }
  static vec repeat(Cell x) { return splat(x); }
  static void add_product(vec& sum, vec a, vec b) { sum += a * b; }
};

inline void narrow_row(const float* x, int64_t n, float* y) { std::memcpy(y, x, sizeof(float) * n); }
inline void narrow_row(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + VL <= n; i += VL) {
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    std::memcpy(y + i, &half, sizeof half);
  }
#endif
  for (; i < n; ++i) narrow(x[i], y + i);
}

// c[M, NR] = a[M, n] * b[n, NR], n in cells
template <class P, int M>
inline void tile(int n, const typename P::Cell* a, int64_t lda, const typename P::Cell* b, float* c, int64_t ldc) {
  vec left[M] = {}, right[M] = {};
  for (int i = 0; i < n; ++i) {
    const auto b0 = P::load_cells(b + i * NR), b1 = P::load_cells(b + i * NR + VL);
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const auto x = P::repeat(a[r * lda + i]);
      P::add_product(left[r], x, b0);
      P::add_product(right[r], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
    store(c + r * ldc, left[r]);
    store(c + r * ldc + VL, right[r]);
  }
}

// c[M, NR] = c * fade[M] + a[M, num * n] * b, where b is `num` runs of [n, NR] that start at base + step * list[.]
template <class P, int M>
inline void add_tiles(int num, const int32_t* list, int64_t step, int n, const typename P::Cell* a, int64_t lda,
                      const typename P::Cell* base, const float* fade, float* c, int64_t ldc) {
  vec left[M], right[M];
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
    left[r] = load(c + r * ldc) * fade[r];
    right[r] = load(c + r * ldc + VL) * fade[r];
  }
  for (int k = 0; k < num; ++k) {
    const typename P::Cell* b = base + step * list[k];
    for (int i = 0; i < n; ++i) {
      const auto b0 = P::load_cells(b + i * NR), b1 = P::load_cells(b + i * NR + VL);
#pragma GCC unroll 16
      for (int r = 0; r < M; ++r) {
        const auto x = P::repeat(a[r * lda + k * n + i]);
        P::add_product(left[r], x, b0);
        P::add_product(right[r], x, b1);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; ++r) {
    store(c + r * ldc, left[r]);
    store(c + r * ldc + VL, right[r]);
  }
}

// Calls f(first row, how many rows as a constant) for runs of MR rows and for the rest.
template <int M, class F>
inline void rest_of_rows(int m, int first, F f) {
  if constexpr (M > 0) {
    if (m == M)
      f(first, std::integral_constant<int, M>{});
    else
      rest_of_rows<M - 1>(m, first, f);
  }
}
template <int M, class F>
inline void by_rows(int rows, F f) {
  int r = 0;
  for (; r + M <= rows; r += M) f(r, std::integral_constant<int, M>{});
  rest_of_rows<M - 1>(rows - r, r, f);
}

template <class P = Full>
inline void rows_by_panel(int rows, int n, const typename P::Cell* a, int64_t lda, const typename P::Cell* b, float* c,
                          int64_t ldc) {
  by_rows<P::MR>(rows, [&](int r, auto m) { tile<P, m>(n, a + r * lda, lda, b, c + r * ldc, ldc); });
}

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// `live` rows of D to the first lanes of a panel [D][WIDE].
template <int WIDE, class S>
void pack_lanes(const S* x, int64_t stride, int64_t live, int64_t D, float* panel) {
  for (int64_t j = 0; j < live; ++j)
    for (int64_t d = 0; d < D; ++d) panel[d * WIDE + j] = widen(x[j * stride + d]);
}

// Rows [T, D] to panels [ceil(T / NR)][D][NR]; rows past T are zero.
template <class S>
void pack_keys(const S* x, int64_t stride, int64_t first, int64_t T, int64_t D, float* panel) {
  const int64_t live = T - first < 0 ? 0 : (T - first > NR ? NR : T - first);
  if (live < NR) std::memset(panel, 0, sizeof(float) * D * NR);
  pack_lanes<NR>(x + first * stride, stride, live, D, panel);
}

// exp(row - top) in place; the sum.
inline float exp_row(float* row, int n, float top) {
  vec total{};
  for (int j = 0; j < n; j += VL) {
    const vec p = exp_of(load(row + j) - top);
    store(row + j, p);
    total += p;
  }
  return sum(total);
}
inline float max_row(const float* row, int n) {
  vec top = splat(-INF);
  for (int j = 0; j < n; j += VL) top = larger(load(row + j), top);
  return peak(top);
}

// Of a row without a largest value: NaN if one is in it, else -inf, as nothing is to be seen.
inline float nothing(const float* row, int64_t n) {
  float total = -INF;
  for (int64_t j = 0; j < n; ++j) total += row[j];
  return total;
}

// Hides from row r (at position first + r) the keys after it and those before its window: key j sits at keys0 + j.
inline void hide(float* s, int64_t lds, int rows, int64_t first, int64_t keys0, int n, int64_t window) {
  for (int r = 0; r < rows; ++r) {
    const int64_t seen = first + r + 1 - keys0;  // keys this row may see, from keys0 on
    for (int64_t j = seen < 0 ? 0 : seen; j < n; ++j) s[r * lds + j] = -INF;
    const int64_t old = window > 0 ? seen - window : 0;
    for (int64_t j = 0; j < old && j < n; ++j) s[r * lds + j] = -INF;
  }
}

// Structs that come from Python are filled by the names that stand here (structs.py): int64_t alone.
struct Prefill {
  int64_t B, Hq, Hkv, Tq, Tk, D, Dv;
  int64_t q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t;  // strides; the last axis is contiguous
  int64_t mask_b, mask_h, num_q, width, block_q, block_k, q_offset, window;
};

// How rows are laid out and weighed before they are multiplied, in fp32 and in pairs of bf16.
struct FullCells : Full {
  template <class S>
  static void pack_query(const S* x, int64_t D, float sign, Cell* cells) {
    for (int64_t d = 0; d < D; ++d) cells[d] = widen(x[d]) * sign;
  }
  template <class S>
  static void pack_key_panel(const S* x, int64_t stride, int64_t first, int64_t T, int64_t D, Cell* panel) {
    pack_keys(x, stride, first, T, D, panel);
  }
  template <int WIDE, class S>
  static void pack_rows(const S* x, int64_t stride, int64_t live, int64_t D, Cell* panel) {
    pack_lanes<WIDE>(x, stride, live, D, panel);
  }
  // NR keys from `first` on, of all columns: column panels lie `apart` cells from each other.
  template <class S>
  static void pack_value_rows(const S* x, int64_t stride, int64_t first, int64_t T, int64_t D, Cell* panel,
                              int64_t apart) {
    for (int64_t d = 0; d < D; d += NR)
      for (int64_t j = 0; j < NR; ++j)
        for (int64_t c = 0; c < NR; ++c)
          panel[d / NR * apart + j * NR + c] =
              first + j < T && d + c < D ? widen(x[(first + j) * stride + d + c]) : 0.0f;
  }
  static void pack_features(const float* x, int64_t n, Cell* cells) { std::memcpy(cells, x, sizeof(float) * n); }
  static vec exp_of_score(vec x) { return exp_of(x); }
  static Cell* weights(float* s, std::vector<Cell>&) { return s; }
  static float weigh(const float* row, int n, float scale, float top, Cell* p) {
    vec total{};
    for (int j = 0; j < n; j += VL) {
      const vec x = exp_of(load(row + j) * scale - top);
      store(p + j, x);
      total += x;
    }
    return sum(total);
  }
};

#if defined(__AVX512BF16__)
struct PairCells {
  typedef uint32_t Cell;
  static constexpr int PER = 2, MR = ::MR;
  static __m512bh load_cells(const Cell* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static __m512bh repeat(Cell x) { return (__m512bh)_mm512_set1_epi32(int(x)); }
  static void add_product(vec& sum, __m512bh a, __m512bh b) { sum = (vec)_mm512_dpbf16_ps((__m512)sum, a, b); }

  static Cell pair(uint16_t a, uint16_t b) { return Cell(a) | Cell(b) << 16; }
  static void pack_query(const uint16_t* x, int64_t D, float sign, Cell* cells) {
    cells[(D - 1) / 2] = 0;  // an odd end has half a cell to itself
    std::memcpy(cells, x, sizeof(uint16_t) * D);
    if (sign < 0.0f)
      for (int64_t i = 0; i < (D + 1) / 2; ++i) cells[i] ^= 0x80008000u;
  }
  static void pack_features(const float* x, int64_t n, Cell* cells) {
    cells[(n - 1) / 2] = 0;  // an odd end has half a cell to itself
    narrow_row(x, n, (uint16_t*)cells);
  }
  static void pack_key_panel(const uint16_t* x, int64_t stride, int64_t first, int64_t T, int64_t D, Cell* panel) {
    const int64_t cells = (D + 1) / 2, live = T - first < 0 ? 0 : (T - first > NR ? NR : T - first);
    if (live < NR) std::memset(panel, 0, sizeof(Cell) * cells * NR);
    pack_rows<NR>(x + first * stride, stride, live, D, panel);
  }
  // `live` rows of D to the first lanes of a panel [cell][WIDE], VL rows and cells at a time where there are as many.
  template <int WIDE>
  static void pack_rows(const uint16_t* x, int64_t stride, int64_t live, int64_t D, Cell* panel) {
    const int64_t tall = live / VL * VL, broad = D / 2 / VL * VL;
    for (int64_t j = 0; j < tall; j += VL)
      for (int64_t i = 0; i < broad; i += VL) turn_square(x + j * stride + 2 * i, stride, panel + i * WIDE + j, WIDE);
    for (int64_t j = 0; j < live; ++j) {
      const uint16_t* row = x + j * stride;
      for (int64_t i = j < tall ? broad : 0; i < D / 2; ++i)
        std::memcpy(&panel[i * WIDE + j], row + 2 * i, sizeof(Cell));
      if (D % 2) panel[D / 2 * WIDE + j] = row[D - 1];
    }
  }
  // VL rows of VL cells, `stride` numbers apart, to rows of what were columns.
  static void turn_square(const uint16_t* x, int64_t stride, Cell* out, int64_t wide) {
    __m512i a[VL], b[VL];
    for (int r = 0; r < VL; ++r) a[r] = _mm512_loadu_si512(x + r * stride);
    for (int r = 0; r < VL; r += 2) {
      b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < VL; r += 4)  // a[r + k]: of each four columns the k-th, of rows r to r + 3
      for (int k = 0; k < 2; ++k) {
        a[r + 2 * k] = _mm512_unpacklo_epi64(b[r + k], b[r + 2 + k]);
        a[r + 2 * k + 1] = _mm512_unpackhi_epi64(b[r + k], b[r + 2 + k]);
      }
    for (int k = 0; k < 4; ++k)
      for (int r = 0; r < VL; r += 8) {
        b[r + k] = _mm512_shuffle_i32x4(a[r + k], a[r + 4 + k], 0x88);      // columns k and 8 + k
        b[r + 4 + k] = _mm512_shuffle_i32x4(a[r + k], a[r + 4 + k], 0xDD);  // 4 + k and 12 + k
      }
    for (int k = 0; k < 8; ++k) {
      _mm512_storeu_si512(out + k * wide, _mm512_shuffle_i32x4(b[k], b[8 + k], 0x88));
      _mm512_storeu_si512(out + (8 + k) * wide, _mm512_shuffle_i32x4(b[k], b[8 + k], 0xDD));
    }
  }
  static void pack_value_rows(const uint16_t* x, int64_t stride, int64_t first, int64_t T, int64_t D, Cell* panel,
                              int64_t apart) {
    for (int64_t d = 0; d < D; d += NR)
      for (int64_t j = 0; j < NR; j += 2) {
        const uint16_t *a = x + (first + j) * stride + d, *b = a + stride;
        const int64_t rows = T - first - j, columns = D - d < NR ? D - d : NR;
        Cell* to = panel + d / NR * apart + j / 2 * NR;
        for (int64_t c = 0; c < NR; ++c)
          to[c] = pair(rows > 0 && c < columns ? a[c] : 0, rows > 1 && c < columns ? b[c] : 0);
      }
  }
  // 2^n times a polynomial of degree 4: relative error below 5e-5, a hundredth of what rounding features to bf16 costs.
  static vec exp_of_score(vec s) {
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-150.0f), (__m512)(s * 1.44269504f));  // NaN stays NaN
    const __m512 whole = _mm512_roundscale_ps(x, 0);
    const vec f = (vec)_mm512_sub_ps(x, whole);
    vec y = splat(9.6181291e-3f);
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    return (vec)_mm512_scalef_ps((__m512)y, whole);
  }
  static Cell* weights(float*, std::vector<Cell>& p) { return p.data(); }
  // 2^n times a polynomial of degree 5: relative error below 3e-6, far below what bf16 can hold; the LSE sums it.
  static float weigh(const float* row, int n, float scale, float top, Cell* p) {
    const float log2e = 1.44269504f;
    vec total{};
    for (int j = 0; j < n; j += VL) {
      const vec t = load(row + j) * (scale * log2e) - top * log2e;
      const __m512 x = _mm512_max_ps(_mm512_set1_ps(-150.0f), (__m512)t);  // NaN stays NaN
      const __m512 whole = _mm512_roundscale_ps(x, 0);
      const vec f = (vec)_mm512_sub_ps(x, whole);
      vec y = splat(1.3333558e-3f);
      y = y * f + 9.6181291e-3f;
      y = y * f + 5.5504109e-2f;
      y = y * f + 2.4022651e-1f;
      y = y * f + 6.9314718e-1f;
      y = y * f + 1.0f;
      const __m512 power = _mm512_scalef_ps((__m512)y, whole);
      total += (vec)power;
      const __m256bh half = _mm512_cvtneps_pbh(power);
      std::memcpy((uint16_t*)p + j, &half, sizeof half);
    }
    return sum(total);
  }
};
#endif

template <class P>
struct Scratch {
  std::vector<typename P::Cell> q, p;
  std::vector<float> s, o, top, total, fade;
  Scratch(int64_t rows, int64_t D, int64_t Dv)
      : q(rows * up(D, P::PER) / P::PER), p(P::PER > 1 ? rows * CHUNK / P::PER : 0), s(rows * CHUNK), o(rows * Dv),
        top(rows), total(rows), fade(rows) {}
};

// One query block of one head: online softmax over its listed blocks, CHUNK keys at a time.
template <class P>
void attend_block(const Prefill& p, Scratch<P>& w, int rows, int64_t first, const int32_t* list, int num,
                  const typename P::Cell* keys, const typename P::Cell* values, int64_t Tp, int64_t Dp, float scale) {
  std::fill(w.o.begin(), w.o.end(), 0.0f);
  std::fill(w.top.begin(), w.top.end(), -INF);
  std::fill(w.total.begin(), w.total.end(), 0.0f);
  const int bk = int(p.block_k), per_chunk = CHUNK / bk;
  const int64_t cells = up(p.D, P::PER) / P::PER;
  typename P::Cell* weights = P::weights(w.s.data(), w.p);
  for (int i = 0; i < num; i += per_chunk) {
    const int here = num - i < per_chunk ? num - i : per_chunk, n = here * bk;
    for (int b = 0; b < here; ++b) {
      const int64_t keys0 = int64_t(list[i + b]) * bk;
      for (int j = 0; j < bk; j += NR)
        rows_by_panel<P>(rows, int(cells), w.q.data(), cells, keys + (keys0 + j) * cells, w.s.data() + b * bk + j,
                         CHUNK);
      const bool is_crossing = keys0 + bk > first + 1;
      const bool is_old = p.window > 0 && keys0 <= first + rows - 1 - p.window;
      if (is_crossing || is_old) hide(w.s.data() + b * bk, CHUNK, rows, first, keys0, bk, p.window);
    }
    for (int r = 0; r < rows; ++r) {
      float* s = w.s.data() + r * CHUNK;
      typename P::Cell* row = weights + r * CHUNK / P::PER;
      const float top = std::fmax(w.top[r], max_row(s, n) * scale);
      w.fade[r] = 1.0f;
      if (top == -INF) {
        w.total[r] += std::isnan(nothing(s, n)) ? NAN : 0.0f;
        std::memset(row, 0, sizeof(typename P::Cell) * n / P::PER);
        continue;
      }
      w.fade[r] = std::exp(w.top[r] - top);
      w.total[r] = w.total[r] * w.fade[r] + P::weigh(s, n, scale, top, row);
      w.top[r] = top;
    }
    for (int64_t d = 0; d < Dp; d += NR)
      by_rows<P::MR>(rows, [&](int r, auto m) {
        add_tiles<P, m>(here, list + i, p.block_k / P::PER * NR, bk / P::PER, weights + r * CHUNK / P::PER,
                        CHUNK / P::PER, values + d * (Tp / P::PER), w.fade.data() + r, w.o.data() + r * Dp + d, Dp);
      });
  }
}

// `pack(b, h_kv, t, keys, values)` lays NR keys and values from t on where the panels of one KV head want them.
template <class P, class S, class Pack>
void prefill_packed(const Prefill& p, const S* q, const int32_t* counts, const int32_t* indices, S* out, float* lse,
                    float scale, int threads, Pack pack) {
  const int64_t Tp = up(p.Tk, p.block_k), Dp = up(p.Dv, NR), group = p.Hq / p.Hkv, cells = up(p.D, P::PER) / P::PER;
  std::vector<typename P::Cell> keys(Tp * cells), values(Tp / P::PER * Dp);
  const float size = std::fabs(scale), sign = scale < 0.0f ? -1.0f : 1.0f;
#pragma omp parallel num_threads(threads)
  {
    Scratch<P> w(p.block_q, p.D, Dp);
    for (int64_t bh = 0; bh < p.B * p.Hkv; ++bh) {
      const int64_t b = bh / p.Hkv, h_kv = bh % p.Hkv;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < Tp; t += NR)
        pack(b, h_kv, t, keys.data() + t * cells, values.data() + t / P::PER * NR, Tp / P::PER * NR);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < p.num_q * group; ++task) {
        const int64_t i_q = p.num_q - 1 - task / group, h = h_kv * group + task % group;  // the longest first
        const int64_t at = ((p.mask_b > 1 ? b : 0) * p.mask_h + h * p.mask_h / p.Hq) * p.num_q + i_q;
        const int64_t row0 = i_q * p.block_q;
        const int rows = int(p.Tq - row0 < p.block_q ? p.Tq - row0 : p.block_q);
        const S* q0 = q + b * p.q_b + h * p.q_h + row0 * p.q_t;
        for (int r = 0; r < rows; ++r) P::pack_query(q0 + r * p.q_t, p.D, sign, w.q.data() + r * cells);
        attend_block<P>(p, w, rows, p.q_offset + row0, indices + at * p.width, counts[at], keys.data(), values.data(),
                        Tp, Dp, size);
        S* o0 = out + b * p.o_b + h * p.o_h + row0 * p.o_t;
        for (int r = 0; r < rows; ++r) {
          const float total = w.total[r], share = total > 0.0f ? 1.0f / total : (total == 0.0f ? 0.0f : total);
          for (int64_t d = 0; d < Dp; d += VL) store(&w.o[r * Dp + d], load(&w.o[r * Dp + d]) * share);
          narrow_row(&w.o[r * Dp], p.Dv, o0 + r * p.o_t);
          lse[(b * p.Hq + h) * p.Tq + row0 + r] = total == 0.0f ? -INF : w.top[r] + std::log(total);
        }
      }
    }
  }
}

template <class P, class S>
void prefill(const Prefill& p, const S* q, const S* k, const S* v, const int32_t* counts, const int32_t* indices,
             S* out, float* lse, float scale, int threads) {
  auto pack = [&](int64_t b, int64_t h, int64_t t, auto* keys, auto* values, int64_t apart) {
    P::pack_key_panel(k + b * p.k_b + h * p.k_h, p.k_t, t, p.Tk, p.D, keys);
    P::pack_value_rows(v + b * p.v_b + h * p.v_h, p.v_t, t, p.Tk, p.Dv, values, apart);
  };
  prefill_packed<P>(p, q, counts, indices, out, lse, scale, threads, pack);
}

typedef uint16_t halves __attribute__((vector_size(VL * 2)));
typedef uint32_t words __attribute__((vector_size(VL * 4)));
inline vec load_wide(const float* x) { return load(x); }
inline vec load_wide(const uint16_t* x) {
  halves y;
  std::memcpy(&y, x, sizeof y);
  return (vec)(__builtin_convertvector(y, words) << 16);
}

// Asks for the cache line of one element that will be read soon.
template <class S>
inline void ask_for(const S* x) {
  __builtin_prefetch(x, 0, 3);
}
template <class S>
constexpr int64_t LINE = 64 / sizeof(S);

// Rows [n, dim] of a KV cache copied as fp32, their ends padded with zeros.
template <class S>
const float* widen_rows(const S* x, int64_t stride, int64_t n, int64_t dim, int64_t padded, float* room) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < dim; ++d) room[j * padded + d] = widen(x[j * stride + d]);
    std::fill(room + j * padded + dim, room + (j + 1) * padded, 0.0f);
  }
  return room;
}

// s[M, n] = a[M, width] * b[n, width]^T, each product one sum over lanes; `next` [n, width] is read after it.
template <int M, class S, class N>
inline void dot_rows(int64_t n, int64_t width, const float* a, int64_t lda, const S* b, int64_t ldb, float* s,
                     int64_t lds, const N* next, int64_t ld_next) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < width; d += LINE<N>) ask_for(next + j * ld_next + d);
    vec x[M] = {};
    for (int64_t d = 0; d < width; d += VL) {
      const vec key = load_wide(b + j * ldb + d);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) x[r] += load(a + r * lda + d) * key;
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) s[r * lds + j] = sum(x[r]);
  }
}

// c[M, width] = c * fade[M] + a[M, n] * b[n, width], width a multiple of NR
template <int M, class S, class N>
inline void add_rows(int64_t n, int64_t width, const float* a, int64_t lda, const S* b, int64_t ldb, const float* fade,
                     float* c, int64_t ldc, const N* next, int64_t ld_next) {
  for (int64_t d = 0; d < width; d += NR) {
    vec left[M], right[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      left[r] = load(c + r * ldc + d) * fade[r];
      right[r] = load(c + r * ldc + d + VL) * fade[r];
    }
    for (int64_t j = 0; j < n; ++j) {
      ask_for(next + j * ld_next + d);
      if (NR > LINE<N>) ask_for(next + j * ld_next + d + LINE<N>);
      const vec b0 = load_wide(b + j * ldb + d), b1 = load_wide(b + j * ldb + d + VL);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        const vec x = splat(a[r * lda + j]);
        left[r] += x * b0;
        right[r] += x * b1;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      store(c + r * ldc + d, left[r]);
      store(c + r * ldc + d + VL, right[r]);
    }
  }
}

// A few query rows against selected blocks of a KV cache, read where they lie.
template <class S>
void decode(const Prefill& p, const S* q, const S* k, const S* v, const int32_t* counts, const int32_t* indices,
            S* out, float* lse, float scale, int threads) {
  const int64_t group = p.Hq / p.Hkv;
  const bool is_shared = p.mask_h <= p.Hkv;  // one list for a KV group: its heads share each load
  const int64_t heads = is_shared ? group : 1, tasks = p.B * p.Hq / heads;
#pragma omp parallel num_threads(threads)
  {
    const int64_t rows = heads * p.Tq, Dp = up(p.D, VL), Vp = up(p.Dv, NR), wide = up(p.block_k, VL);
    std::vector<float> qs(rows * Dp), o(rows * Vp), s(rows * wide), top(rows), total(rows), fade(rows),
        room(std::max(Dp, Vp) * p.block_k);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task * heads / p.Hq, h0 = task * heads % p.Hq, h_kv = h0 / group;
      const int64_t list = (p.mask_b > 1 ? b : 0) * p.mask_h + h0 * p.mask_h / p.Hq;
      const S *k0 = k + b * p.k_b + h_kv * p.k_h, *v0 = v + b * p.v_b + h_kv * p.v_h;
      std::fill(qs.begin(), qs.end(), 0.0f);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < p.D; ++d)
          qs[r * Dp + d] = widen(q[b * p.q_b + (h0 + r / p.Tq) * p.q_h + (r % p.Tq) * p.q_t + d]) * scale;
      std::fill(o.begin(), o.end(), 0.0f);
      std::fill(top.begin(), top.end(), -INF);
      std::fill(total.begin(), total.end(), 0.0f);
      for (int i = 0; i < counts[list]; ++i) {
        const int64_t keys0 = int64_t(indices[list * p.width + i]) * p.block_k;
        const int64_t n = std::min(p.block_k, p.Tk - keys0);
        const S* keys = k0 + keys0 * p.k_t;
        const S* values = v0 + keys0 * p.v_t;
        const int64_t then = i + 1 < counts[list] ? int64_t(indices[list * p.width + i + 1]) * p.block_k : keys0;
        const S* next = k0 + std::min(then, std::max(p.Tk - n, int64_t(0))) * p.k_t;  // n rows of it exist
        if (Dp != p.D) widen_rows(keys, p.k_t, n, p.D, Dp, room.data());
        by_rows<4>(int(rows), [&](int r, auto m) {
          const float* a = qs.data() + r * Dp;
          float* to = s.data() + r * wide;
          if (Dp == p.D)
            dot_rows<m>(n, Dp, a, Dp, keys, p.k_t, to, wide, values, p.v_t);
          else
            dot_rows<m>(n, Dp, a, Dp, room.data(), Dp, to, wide, room.data(), Dp);
        });
        for (int64_t r = 0; r < rows; ++r) {
          float* row = &s[r * wide];
          const int64_t position = p.q_offset + r % p.Tq;
          hide(row, wide, 1, position, keys0, int(n), p.window);
          for (int64_t j = n; j < wide; ++j) row[j] = -INF;
          const float high = std::fmax(top[r], max_row(row, int(wide)));
          fade[r] = 1.0f;
          if (high == -INF) {
            total[r] += std::isnan(nothing(row, n)) ? NAN : 0.0f;
            std::fill(row, row + wide, 0.0f);
            continue;
          }
          fade[r] = std::exp(top[r] - high);
          total[r] = total[r] * fade[r] + exp_row(row, int(wide), high);
          top[r] = high;
        }
        if (Vp != p.Dv) widen_rows(values, p.v_t, n, p.Dv, Vp, room.data());
        by_rows<4>(int(rows), [&](int r, auto m) {
          const float* a = s.data() + r * wide;
          float* to = o.data() + r * Vp;
          if (Vp == p.Dv)
            add_rows<m>(n, Vp, a, wide, values, p.v_t, fade.data() + r, to, Vp, next, p.k_t);
          else
            add_rows<m>(n, Vp, a, wide, room.data(), Vp, fade.data() + r, to, Vp, room.data(), Vp);
        });
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t h = h0 + r / p.Tq, t = r % p.Tq;
        const float share = total[r] > 0.0f ? 1.0f / total[r] : (total[r] == 0.0f ? 0.0f : total[r]);
        for (int64_t d = 0; d < p.Dv; ++d) narrow(o[r * Vp + d] * share, out + b * p.o_b + h * p.o_h + t * p.o_t + d);
        lse[(b * p.Hq + h) * p.Tq + t] = total[r] == 0.0f ? -INF : top[r] + std::log(total[r]);
      }
    }
  }
}

// log of the summed exp over `n` values, a multiple of VL.
inline float log_sum(const float* x, int64_t n) {
  const float top = max_row(x, int(n));
  if (top == -INF) return nothing(x, n);
  vec total{};
  for (int64_t j = 0; j < n; j += VL) total += exp_of(load(x + j) - top);
  return top + std::log(sum(total));
}

// Takes the rotary embedding out of one row; a scaled embedding (YaRN) is divided out by cos^2 + sin^2.
inline void unrotate(const float* x, const float* cos, const float* sin, int64_t D, float* out) {
  const int64_t half = D / 2;
  auto shrink = [&](int64_t d) {
    const float size = cos[d] * cos[d] + sin[d] * sin[d];
    return 1.0f / (size > 1e-6f ? size : 1e-6f);
  };
  for (int64_t d = 0; d < half; ++d) out[d] = (x[d] * cos[d] + x[d + half] * sin[d]) * shrink(d);
  for (int64_t d = half; d < D; ++d) out[d] = (x[d] * cos[d] - x[d - half] * sin[d]) * shrink(d);
}

inline float square(const float* x, int64_t n) {
  float lanes[VL] = {};
  int64_t d = 0;
  for (; d + VL <= n; d += VL)
    for (int j = 0; j < VL; ++j) lanes[j] += x[d + j] * x[d + j];
  float total = 0;
  for (; d < n; ++d) total += x[d] * x[d];
  for (int j = 0; j < VL; ++j) total += lanes[j];
  return total;
}

inline float log_add(float a, float b) {
  const float top = std::fmax(a, b);
  return top == -INF ? a + b : top + std::log(std::exp(a - top) + std::exp(b - top));
}

#include "rows.h"

struct Scores {
  int64_t H, Hkv, n, rows, row_tokens, num_rows;  // query blocks, rows in each, tokens of a row, tokens in all
  int64_t one_in;  // of so many rows one is scored
  int64_t D, rank, is_residual, pools, blocks, block;  // pools per block, full key blocks that may be chosen
  int64_t q_h, q_t, k_h, k_t, T, first;  // raw queries and keys; position of the first row
  int64_t out_blocks, num_bias, pooled_h, panel_h, from_block;  // features and panels by KV head; the first to pack
};

#include "chosen_rows.h"

// Log of what one block of raw keys holds of each row, added to `forced`: a row sees what the token at lasts[row] sees.
template <class P>
void measure_block(const Scores& p, const typename P::Cell* query, const typename P::Cell* panels, int rows,
                   const int64_t* lasts, int64_t block_index, float scale, float* exact, float* forced) {
  const int64_t wide = up(p.block, NR), cells = up(p.D, P::PER) / P::PER;
  for (int64_t j = 0; j < wide; j += NR)
    rows_by_panel<P>(rows, int(cells), query, cells, panels + j * cells, exact + j, wide);
  for (int64_t j = 0; j < rows * wide; j += VL) store(exact + j, load(exact + j) * scale);
  for (int r = 0; r < rows; ++r) {
    float* row = exact + r * wide;
    for (int64_t j = p.block; j < wide; ++j) row[j] = -INF;
    hide(row, wide, 1, lasts[r], block_index * p.block, int(wide), 0);
    forced[r] = log_add(forced[r], log_sum(row, wide));
  }
}

inline bool has_nan(const float* x, int64_t n) {
  ivec is_odd{};
  for (int64_t j = 0; j < n; j += VL) is_odd |= load(x + j) != load(x + j);
  for (int j = 0; j < VL; ++j)
    if (is_odd[j]) return true;
  return false;
}

// The largest share over a query block's rows of each open block, from log masses that lack the bias: logits
// [rows, columns] are overwritten; best [out_blocks]. Returns whether one is NaN.
inline bool best_shares(const Scores& p, int rows, int64_t columns, int64_t open, const float* bias, const float* forced,
                        float* logits, float* far, float* most, float* best) {
  const int64_t end = up(open, VL);
  std::fill(far, far + columns, 0.0f);
  for (int64_t j = 1; j < open; ++j) far[j] = bias[-j];
  std::fill(most, most + columns, -INF);
  for (int r = 0; r < rows; ++r) {
    float* row = logits + r * columns;
    for (int64_t j = 0; j < end; j += VL) store(row + j, load(row + j) + load(far + j));
    row[0] = -INF;
    for (int64_t j = open; j < end; ++j) row[j] = -INF;
    const float total = log_add(log_sum(row, end), forced[r]);
    for (int64_t j = 0; j < end; j += VL) {
      const vec share = load(row + j) - total, old = load(most + j);
      store(most + j, share > old ? share : (share == share ? old : share));  // NaN is kept
    }
  }
  std::memcpy(best + 1, most + 1, sizeof(float) * (open - 1));
  return has_nan(most, end);
}

// Largest estimated log share, over a query block's rows, of every block that they may choose: out [H, n, out_blocks].
// A row's features are [gain * q, norm(unrotated q) * map], or [q, unrotated q] * map without the residual; a pool's
// are in `pooled` [Hkv, blocks * pools, features], strided by head. Sink and diagonal are measured exactly. cos and sin
// [num_rows, D] are those of the rows; `maps` is [H, D or 2 D, rank]. Returns whether a share is NaN.
template <class P, class S>
int scores(const Scores& p, const S* q, const S* k, const S* pooled, const float* cos, const float* sin,
            const float* maps, const float* gains, const float* bias, float scale, float log_pool, float* out,
            int threads) {
  typedef typename P::Cell Cell;
  const int64_t group = p.H / p.Hkv, columns = up(p.blocks, NR), wide = up(p.block, NR);
  const int64_t own = p.is_residual ? p.D : 0, E = own + p.rank, W = p.is_residual ? p.D : 2 * p.D;
  const int64_t padded = up(p.rank, NR), lde = own + padded;
  const int64_t cells = up(E, P::PER) / P::PER, raw_cells = up(p.D, P::PER) / P::PER;
  std::vector<Cell> packed(columns * p.pools * cells), sink(wide * raw_cells);
  std::vector<float> map(group * padded * W);
  int is_odd = 0;
#pragma omp parallel num_threads(threads) reduction(| : is_odd)
  {
    std::vector<float> s(p.pools * MR * NR), logits(p.rows * columns), exact(p.rows * wide), scratch(2 * p.D),
        plain(p.rows * W), row(2 * p.D), encoded(p.rows * lde), forced(p.rows), far(columns), most(columns);
    std::vector<Cell> near(wide * raw_cells), raw_query(p.rows * raw_cells), query(p.rows * cells);
    std::vector<int64_t> lasts(p.rows);
    std::vector<int> chosen(p.rows);
    RowChoice<P> choice(p.D);
    Unrotation turn(p.rows * p.row_tokens * p.D);
    for (int64_t h_kv = 0; h_kv < p.Hkv; ++h_kv) {
      const S* keys = pooled + h_kv * p.pooled_h;
      const S* raw = k + h_kv * p.k_h;
#pragma omp for schedule(static)
      for (int64_t c = 0; c < columns; c += NR)  // [column panel][pool][cells][NR]: lanes are blocks
        for (int64_t i = 0; i < p.pools; ++i)
          P::pack_key_panel(keys + i * E, p.pools * E, c, p.blocks, E, packed.data() + (c * p.pools + i * NR) * cells);
#pragma omp single
      {
        for (int64_t t = 0; t < wide; t += NR)
          P::pack_key_panel(raw, p.k_t, t, std::min(p.block, p.T), p.D, sink.data() + t * raw_cells);
        for (int64_t g = 0; g < group; ++g)
          pack_map(maps + (h_kv * group + g) * W * p.rank, W, p.rank, &map[g * padded * W]);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < p.n * group; ++task) {
        const int64_t i_q = p.n - 1 - task / group, h = h_kv * group + task % group;
        const int64_t row0 = i_q * p.rows * p.row_tokens, start = p.first + row0, home = start / p.block;
        const int all_rows = int(p.row_tokens > 1 ? p.rows : std::min(p.rows, p.num_rows - row0));
        const int64_t open = std::min(home, p.blocks);  // blocks 1 .. open - 1 may be chosen
        std::fill_n(out + (h * p.n + i_q) * p.out_blocks, p.out_blocks, -INF);
        if (open <= 1) continue;
        const int64_t live = std::min(p.rows * p.row_tokens, p.num_rows - row0);
        turn.read(cos + row0 * p.D, sin + row0 * p.D, live, p.D);
        const int rows = choice.choose(q + h * p.q_h + row0 * p.q_t, p.q_t, all_rows, p.one_in, chosen.data());
        for (int r = 0; r < rows; ++r) {
          const int64_t t = std::min(chosen[r] * p.row_tokens, live - 1);
          lasts[r] = std::min(start + (chosen[r] + 1) * p.row_tokens, p.first + p.num_rows) - 1;
          mean_row(q + h * p.q_h + (row0 + t) * p.q_t, p.q_t, p.row_tokens, live - t, p.D, &turn.own[t * p.D],
                   &turn.other[t * p.D], scratch.data(), row.data());
          P::pack_features(row.data(), p.D, raw_query.data() + r * raw_cells);
          std::memcpy(&plain[r * W], row.data() + 2 * p.D - W, sizeof(float) * W);
          if (!p.is_residual) continue;
          for (int64_t d = 0; d < p.D; ++d) encoded[r * lde + d] = row[d] * gains[h];
          const float norm = 1.0f / std::sqrt(square(&plain[r * W], p.D) / float(p.D) + 1e-6f);
          for (int64_t d = 0; d < p.D; ++d) plain[r * W + d] *= norm;
        }
        for (int64_t c = 0; c < padded; c += NR)
          rows_by_panel(rows, int(W), plain.data(), W, &map[(task % group * padded + c) * W], encoded.data() + own + c,
                        lde);
        for (int r = 0; r < rows; ++r) P::pack_features(encoded.data() + r * lde, E, query.data() + r * cells);
        std::fill(forced.begin(), forced.end(), -INF);
        auto measure = [&](const Cell* panels, int64_t i) {
          measure_block<P>(p, raw_query.data(), panels, rows, lasts.data(), i, scale, exact.data(), forced.data());
        };
        measure(sink.data(), 0);
        const int64_t end = start + p.rows * p.row_tokens;
        for (int64_t i = home; i * p.block < std::min(end, p.first + p.num_rows); ++i) {  // two, inside a block
          for (int64_t t = 0; t < wide; t += NR)
            P::pack_key_panel(raw + i * p.block * p.k_t, p.k_t, t, std::min(p.block, p.T - i * p.block), p.D,
                              near.data() + t * raw_cells);
          measure(near.data(), i);
        }
        std::fill(logits.begin(), logits.begin() + rows * columns, -INF);
        for (int64_t c = 0; c < up(open, NR); c += NR)
          for (int r0 = 0; r0 < rows; r0 += MR) {
            const int m = std::min(MR, rows - r0);
            for (int64_t i = 0; i < p.pools; ++i)
              rows_by_panel<P>(m, int(cells), query.data() + r0 * cells, cells,
                               packed.data() + (c * p.pools + i * NR) * cells, s.data() + i * MR * NR, NR);
            for (int r = 0; r < m; ++r)
              for (int j = 0; j < NR; j += VL) {
                if (p.pools == 1) {
                  store(&logits[(r0 + r) * columns + c + j], load(&s[r * NR + j]) + log_pool);
                  continue;
                }
                vec top = splat(-INF), total{};
                for (int64_t i = 0; i < p.pools; ++i) top = larger(load(&s[(i * MR + r) * NR + j]), top);
                for (int64_t i = 0; i < p.pools; ++i) total += P::exp_of_score(load(&s[(i * MR + r) * NR + j]) - top);
                store(&logits[(r0 + r) * columns + c + j], top + log_of(total) + log_pool);
              }
          }
        is_odd |= best_shares(p, rows, columns, open, bias + h * p.num_bias + home, forced.data(), logits.data(),
                              far.data(), most.data(), out + (h * p.n + i_q) * p.out_blocks);
      }
    }
  }
  return is_odd;
}

#include "byte_scores.h"

// The key blocks of a query block: its own from `home` on, `ahead` the first that no row sees.
struct Causal {
  int64_t home, ahead;
  Causal(int64_t i_q, int64_t blocks, int64_t start, int64_t block_q, int64_t block_k, int64_t end) {
    const int64_t first = start + i_q * block_q, last = std::min(first + block_q, end) - 1;
    ahead = std::min(blocks, last / block_k + 1);
    home = std::min(first / block_k, ahead);
  }
};

}  // namespace

extern "C" {

void sentei_prefill_f32(const Prefill* p, const float* q, const float* k, const float* v, const int32_t* counts,
                        const int32_t* indices, float* out, float* lse, float scale, int threads) {
  prefill<FullCells>(*p, q, k, v, counts, indices, out, lse, scale, threads);
}
void sentei_prefill_bf16(const Prefill* p, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                         const int32_t* counts, const int32_t* indices, uint16_t* out, float* lse, float scale,
                         int threads) {
#if defined(__AVX512BF16__)
  prefill<PairCells>(*p, q, k, v, counts, indices, out, lse, scale, threads);
#else
  prefill<FullCells>(*p, q, k, v, counts, indices, out, lse, scale, threads);
#endif
}
void sentei_decode_f32(const Prefill* p, const float* q, const float* k, const float* v, const int32_t* counts,
                       const int32_t* indices, float* out, float* lse, float scale, int threads) {
  decode(*p, q, k, v, counts, indices, out, lse, scale, threads);
}
void sentei_decode_bf16(const Prefill* p, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                        const int32_t* counts, const int32_t* indices, uint16_t* out, float* lse, float scale,
                        int threads) {
  decode(*p, q, k, v, counts, indices, out, lse, scale, threads);
}

// Attention mass per key block of sampled rows: q [H, R, D] scaled, at `positions` [R]; keys [Hkv, T, D], all
// contiguous; lse [H, R], mass [H, R, blocks], which the caller has set to zero.
void sentei_block_mass(const float* q, const float* k, const int64_t* positions, float* lse, float* mass, int64_t H,
                       int64_t Hkv, int64_t R, int64_t T, int64_t D, int64_t block, int64_t window, int threads) {
  const int64_t Tp = up(T, block), blocks = Tp / block, group = H / Hkv, tall = 64;
  std::vector<float> keys(Tp * D);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> s(tall * block), logs(tall * up(blocks, VL));
    const int64_t ldl = up(blocks, VL);
    for (int64_t h_kv = 0; h_kv < Hkv; ++h_kv) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < Tp; t += NR) pack_keys(k + h_kv * T * D, D, t, T, D, keys.data() + t * D);
      const int64_t num = (R + tall - 1) / tall;
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < num * group; ++task) {
        const int64_t first = (num - 1 - task / group) * tall, h = h_kv * group + task % group;
        const int rows = int(std::min(tall, R - first));
        const float* q0 = q + (h * R + first) * D;
        int64_t end = 0;
        for (int r = 0; r < rows; ++r) end = std::max(end, positions[first + r] + 1);
        const int64_t seen = (end + block - 1) / block;
        std::fill(logs.begin(), logs.end(), -INF);
        for (int64_t i = 0; i < seen; ++i) {
          for (int64_t j = 0; j < block; j += NR)
            rows_by_panel(rows, int(D), q0, D, keys.data() + (i * block + j) * D, s.data() + j, block);
          for (int r = 0; r < rows; ++r) {
            hide(s.data() + r * block, block, 1, positions[first + r], i * block, int(block), window);
            logs[r * ldl + i] = log_sum(s.data() + r * block, block);
          }
        }
        for (int r = 0; r < rows; ++r) {
          const float total = log_sum(logs.data() + r * ldl, up(seen, VL));
          lse[h * R + first + r] = total;
          float* row = mass + (h * R + first + r) * blocks;
          int64_t i = 0;
          for (; i + VL <= seen; i += VL) store(row + i, exp_of(load(&logs[r * ldl + i]) - total));
          for (; i < seen; ++i) row[i] = std::exp(logs[r * ldl + i] - total);
        }
      }
    }
  }
}

// Means over each full run of `size` keys, with and without their rotation: k [Hkv, T, D] at positions 0 .. T - 1 of
// the tables, results [Hkv, T / size, D].
void sentei_pool(const float* k, int64_t k_h, int64_t k_t, const float* cos, const float* sin, float* pooled,
                 float* plain, int64_t Hkv, int64_t T, int64_t D, int64_t size, int threads) {
  const int64_t num = T / size;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(D);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < Hkv * num; ++at) {
      const int64_t h = at / num, first = at % num * size;
      float *mean = pooled + at * D, *mean_plain = plain + at * D;
      std::fill(mean, mean + D, 0.0f);
      std::fill(mean_plain, mean_plain + D, 0.0f);
      for (int64_t t = first; t < first + size; ++t) {
        const float* x = k + h * k_h + t * k_t;
        unrotate(x, cos + t * D, sin + t * D, D, row.data());
        for (int64_t d = 0; d < D; ++d) mean[d] += x[d];
        for (int64_t d = 0; d < D; ++d) mean_plain[d] += row[d];
      }
      for (int64_t d = 0; d < D; ++d) mean[d] /= float(size);
      for (int64_t d = 0; d < D; ++d) mean_plain[d] /= float(size);
    }
  }
}

// Features of single tokens: k [heads, T, D] strided, maps [maps_num, 2 D, rank], features [heads, T, rank].
void sentei_encode_f32(const float* k, int64_t k_h, int64_t k_t, const float* cos, const float* sin, const float* maps,
                       int64_t maps_num, float* features, int64_t heads, int64_t T, int64_t D, int64_t rank,
                       int threads) {
  encode(k, k_h, k_t, cos, sin, maps, maps_num, features, heads, T, D, rank, threads);
}
void sentei_encode_bf16(const uint16_t* k, int64_t k_h, int64_t k_t, const float* cos, const float* sin,
                        const float* maps, int64_t maps_num, uint16_t* features, int64_t heads, int64_t T, int64_t D,
                        int64_t rank, int threads) {
  encode(k, k_h, k_t, cos, sin, maps, maps_num, features, heads, T, D, rank, threads);
}

int sentei_scores_f32(const Scores* p, const float* q, const float* k, const float* pooled, const float* cos,
                       const float* sin, const float* maps, const float* gains, const float* bias, float scale,
                       float log_pool, float* out, int threads) {
  return scores<FullCells>(*p, q, k, pooled, cos, sin, maps, gains, bias, scale, log_pool, out, threads);
}
int sentei_scores_bf16(const Scores* p, const uint16_t* q, const uint16_t* k, const uint16_t* pooled,
                        const float* cos, const float* sin, const float* maps, const float* gains, const float* bias,
                        float scale, float log_pool, float* out, int threads) {
#if defined(__AVX512BF16__)
  return scores<PairCells>(*p, q, k, pooled, cos, sin, maps, gains, bias, scale, log_pool, out, threads);
#else
  return scores<FullCells>(*p, q, k, pooled, cos, sin, maps, gains, bias, scale, log_pool, out, threads);
#endif
}

// Whether features of this rank can be scored in 8 bits here.
int sentei_has_byte_scores(int64_t rank) { return has_byte_scores(rank); }

// Cells of one KV head's panels and floats of one query head's map, as the packing programs write them.
int64_t sentei_byte_panel_size(const Scores* p) { return byte_panel_size(*p); }
int64_t sentei_byte_map_size(const Scores* p) { return byte_map_size(*p); }

void sentei_pack_bytes_f32(const Scores* p, const float* pooled, const float* inverse_steps, uint32_t* panels,
                           float* flaws, int threads) {
  pack_byte_panels(*p, pooled, inverse_steps, panels, flaws, threads);
}
void sentei_pack_bytes_bf16(const Scores* p, const uint16_t* pooled, const float* inverse_steps, uint32_t* panels,
                            float* flaws, int threads) {
  pack_byte_panels(*p, pooled, inverse_steps, panels, flaws, threads);
}
void sentei_gather_bytes(const Scores* p, const int32_t* table, const uint32_t* pages, const float* page_flaws,
                         uint32_t* panels, float* flaws, int threads) {
  gather_byte_panels(*p, table, pages, page_flaws, panels, flaws, threads);
}
void sentei_pack_byte_maps(const Scores* p, const float* maps, const float* steps, float* packed) {
  pack_byte_maps(*p, maps, steps, packed);
}

int sentei_byte_scores_f32(const Scores* p, int64_t batch, const float* q, int64_t q_b, const float* k, int64_t k_b,
                            const uint32_t* panels, const float* flaws, const float* maps, const float* cos,
                            const float* sin, const float* bias, float scale, float* out, int threads) {
  return byte_scores<FullCells>(*p, batch, q, q_b, k, k_b, panels, flaws, maps, cos, sin, bias, scale, out, threads);
}
int sentei_byte_scores_bf16(const Scores* p, int64_t batch, const uint16_t* q, int64_t q_b, const uint16_t* k,
                             int64_t k_b, const uint32_t* panels, const float* flaws, const float* maps,
                             const float* cos, const float* sin, const float* bias, float scale, float* out,
                             int threads) {
#if defined(__AVX512BF16__)
  return byte_scores<PairCells>(*p, batch, q, q_b, k, k_b, panels, flaws, maps, cos, sin, bias, scale, out, threads);
#else
  return byte_scores<FullCells>(*p, batch, q, q_b, k, k_b, panels, flaws, maps, cos, sin, bias, scale, out, threads);
#endif
}

// How many blocks are kept: those whose share passes, sink and diagonal: counts [H, n] from shares [H, n, blocks],
// thresholds [H, n]. What lies ahead is never kept.
void sentei_count(const float* shares, const float* thresholds, int32_t* counts, int64_t H, int64_t n, int64_t blocks,
                  int64_t start, int64_t block_q, int64_t block_k, int64_t end, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t at = 0; at < H * n; ++at) {
    const Causal in(at % n, blocks, start, block_q, block_k, end);
    const float *row = shares + at * blocks, cut = thresholds[at];
    int32_t num = 0;
    for (int64_t j = 1; j < in.home; ++j) num += row[j] > cut;
    counts[at] = num + int32_t(in.ahead - in.home) + (in.home > 0);
  }
}

// Which blocks they are, in order: indices [H, n, width], -1 behind the last one.
void sentei_list(const float* shares, const float* thresholds, const int32_t* counts, int32_t* indices, int64_t width,
                 int64_t H, int64_t n, int64_t blocks, int64_t start, int64_t block_q, int64_t block_k, int64_t end,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t at = 0; at < H * n; ++at) {
    const Causal in(at % n, blocks, start, block_q, block_k, end);
    const float *row = shares + at * blocks, cut = thresholds[at];
    int32_t* list = indices + at * width;
    int64_t num = 0;
    for (int64_t j = 0; j < in.ahead; ++j)
      if (j == 0 || j >= in.home || row[j] > cut) list[num++] = int32_t(j);
    std::fill(list + counts[at], list + width, -1);
  }
}
}

#include "paged.hpp"
