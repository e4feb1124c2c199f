// Rows of queries and keys with and without their rotation, and their features: a part of programs.cpp, which
// includes it in its namespace.

// What takes the rotation out of neighbouring tokens, read once for a query block: a token without it is
// x * own + (the other half of x) * other. A scaled embedding (YaRN) is divided out by cos^2 + sin^2.
struct Unrotation {
  std::vector<float> own, other;
  explicit Unrotation(int64_t size) : own(size), other(size) {}
  void read(const float* cos, const float* sin, int64_t tokens, int64_t D) {
    const int64_t half = D / 2, whole = half % VL == 0 ? half : 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t low = t * D, high = low + half;
      for (int64_t d = 0; d < whole; d += VL) {
        read_lanes(load(cos + low + d), load(sin + low + d), 1.0f, low + d);
        read_lanes(load(cos + high + d), load(sin + high + d), -1.0f, high + d);
      }
      for (int64_t d = 2 * whole; d < D; ++d) {
        const float c = cos[low + d], s = sin[low + d], size = c * c + s * s;
        const float shrink = 1.0f / (size > 1e-6f ? size : 1e-6f);
        own[low + d] = c * shrink;
        other[low + d] = (d < half ? s : -s) * shrink;
      }
    }
  }

 private:
  void read_lanes(vec c, vec s, float sign, int64_t at) {
    const vec shrink = 1.0f / larger(c * c + s * s, splat(1e-6f));
    store(&own[at], c * shrink);
    store(&other[at], s * sign * shrink);
  }
};

template <class S>
void widen_row(const S* __restrict__ x, int64_t D, float* __restrict__ out) {
  int64_t d = 0;
  for (; d + VL <= D; d += VL) store(out + d, load_wide(x + d));
  for (; d < D; ++d) out[d] = widen(x[d]);
}

// A row with and without its rotation [2 D]: the mean of `num` tokens from x on, of which `live` are there; the others
// are the last one again.
template <class S>
__attribute__((noinline)) void mean_row(const S* __restrict__ x, int64_t stride, int64_t num, int64_t live, int64_t D,
                                        const float* __restrict__ own, const float* __restrict__ other,
                                        float* __restrict__ scratch, float* __restrict__ out) {
  const int64_t half = D / 2;
  if (num == 1 && half % VL == 0) {
    for (int64_t d = 0; d < half; d += VL) {
      const vec low = load_wide(x + d), high = load_wide(x + half + d);
      store(out + d, low);
      store(out + half + d, high);
      store(out + D + d, low * load(own + d) + high * load(other + d));
      store(out + D + half + d, high * load(own + half + d) + low * load(other + half + d));
    }
    return;
  }
  for (int64_t i = 0; i < num; ++i) {
    const int64_t t = std::min(i, live - 1);
    float* to = i == 0 ? out : scratch;
    for (int64_t d = 0; d < D; ++d) to[d] = widen(x[t * stride + d]);
    for (int64_t d = 0; d < half; ++d) to[D + d] = to[d] * own[t * D + d] + to[half + d] * other[t * D + d];
    for (int64_t d = half; d < D; ++d) to[D + d] = to[d] * own[t * D + d] + to[d - half] * other[t * D + d];
    if (i > 0)
      for (int64_t d = 0; d < 2 * D; ++d) out[d] += scratch[d];
  }
  if (num > 1)
    for (int64_t d = 0; d < 2 * D; ++d) out[d] *= 1.0f / float(num);
}

// A map [W, rank] to column panels [columns of NR][W][NR], its columns past `rank` zero.
inline void pack_map(const float* map, int64_t W, int64_t rank, float* panels) {
  for (int64_t c = 0; c < up(rank, NR); ++c)
    for (int64_t d = 0; d < W; ++d)
      panels[c / NR * NR * W + d * NR + c % NR] = c < rank ? map[d * rank + c] : 0.0f;
}

// Features of single tokens, [k, k without its rotation] * map: k [heads, T, D] strided, maps [maps_num, 2 D, rank], of
// which head h takes h % maps_num, features [heads, T, rank].
template <class S>
void encode(const S* k, int64_t k_h, int64_t k_t, const float* cos, const float* sin, const float* maps,
            int64_t maps_num, S* features, int64_t heads, int64_t T, int64_t D, int64_t rank, int threads) {
  constexpr int64_t RUN = 2 * MR;
  const int64_t W = 2 * D, padded = up(rank, NR), runs = (T + RUN - 1) / RUN;
  std::vector<float> packed(maps_num * padded * W);
  for (int64_t m = 0; m < maps_num; ++m) pack_map(maps + m * W * rank, W, rank, packed.data() + m * padded * W);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> rows(RUN * W), encoded(RUN * padded);
    Unrotation turn(RUN * D);
#pragma omp for schedule(static)
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t first = run * RUN, num = std::min(RUN, T - first);
      turn.read(cos + first * D, sin + first * D, num, D);
      for (int64_t h = 0; h < heads; ++h) {
        const S* x = k + h * k_h + first * k_t;
        for (int64_t t = 0; t < num; ++t)
          mean_row(x + t * k_t, k_t, 1, 1, D, &turn.own[t * D], &turn.other[t * D], (float*)nullptr, &rows[t * W]);
        const float* map = packed.data() + h % maps_num * padded * W;
        for (int64_t c = 0; c < padded; c += NR)
          rows_by_panel(int(num), int(W), rows.data(), W, map + c * W, encoded.data() + c, padded);
        for (int64_t t = 0; t < num; ++t)
          narrow_row(encoded.data() + t * padded, rank, features + (h * T + first + t) * rank);
      }
    }
  }
}
