// Vectors and register tiles: what all device functions of a fused policy share.

//: prelude
typedef REAL real;
#if defined(__CUDA_ARCH__)
  #define WS_SYNC() __syncthreads()
#else
  #define WS_SYNC()
  #if defined(__AVX512F__)
    #define WS_VB 64
    #define WS_NV 4
    #define WS_RO 8
  #else
    #define WS_VB 32
    #define WS_NV 3
    #define WS_RO 4
  #endif
  enum { VL = WS_VB / (int)sizeof(real), LINE = 64 / (int)sizeof(real), FETCH = 32 * LINE };
  typedef real vec __attribute__((ext_vector_type(VL)));
  #define WS_LOAD(p) ([](const real* q_) { vec v_; __builtin_memcpy(&v_, q_, sizeof(vec)); return v_; })(p)
  #define WS_STORE(p, v) do { vec s_ = (v); __builtin_memcpy((p), &s_, sizeof(vec)); } while (0)
  #define WS_FMA(a, b, c) __builtin_elementwise_fma(a, b, c)
  #define WS_ZERO(R, V) \
    vec acc[R][V]; \
    _Pragma("unroll") for (int r = 0; r < R; ++r) \
      _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = (vec)(real(0));
  // acc[r][v] += sum_k x[xr(r) + k * xk] * m[k * mk + v * VL + lane], for R rows and V vectors
  #define WS_TILE(R, V, x, xr, xk, m, mk, K) \
    { const real* m_ = (m); const real* x_ = (x); \
      for (int k = 0; k < (K); ++k, m_ += (mk), x_ += (xk)) { \
        vec w_[V]; \
        _Pragma("unroll") for (int v = 0; v < V; ++v) w_[v] = WS_LOAD(m_ + v * VL); \
        _Pragma("unroll") for (int r = 0; r < R; ++r) { \
          vec b_ = (vec)(x_[xr(r)]); \
          _Pragma("unroll") for (int v = 0; v < V; ++v) acc[r][v] = WS_FMA(b_, w_[v], acc[r][v]); } } }
  // the same for one vector: a second set of sums, since a few chains of additions leave the units waiting
  #define WS_NARROW_TILE(R, x, xr, m, mk, K) \
    { const real* m_ = (m); const real* x_ = (x); vec odd_[R]; \
      _Pragma("unroll") for (int r = 0; r < R; ++r) odd_[r] = (vec)(real(0)); \
      int k = 0; \
      for (; k + 1 < (K); k += 2, m_ += 2 * (mk), x_ += 2) { \
        const vec w0_ = WS_LOAD(m_), w1_ = WS_LOAD(m_ + (mk)); \
        _Pragma("unroll") for (int r = 0; r < R; ++r) { \
          acc[r][0] = WS_FMA((vec)(x_[xr(r)]), w0_, acc[r][0]); \
          odd_[r] = WS_FMA((vec)(x_[xr(r) + 1]), w1_, odd_[r]); } } \
      if (k < (K)) { \
        const vec w0_ = WS_LOAD(m_); \
        _Pragma("unroll") for (int r = 0; r < R; ++r) \
          acc[r][0] = WS_FMA((vec)(x_[xr(r)]), w0_, acc[r][0]); } \
      _Pragma("unroll") for (int r = 0; r < R; ++r) acc[r][0] += odd_[r]; }
  #define WS_EACH(R, V, BODY) \
    _Pragma("unroll") for (int r = 0; r < R; ++r) \
      _Pragma("unroll") for (int v = 0; v < V; ++v) { BODY }
  // LAYER(V) takes columns j ... j + V * VL of `pitch` with R rows. Which vector goes alone, and is added up
  // in another order, depends on the pitch only: a row has the same numbers in a low and in a tall tile
  #define WS_COLUMNS(R, pitch, LAYER) \
    { int j = 0; \
      const int alone_ = (pitch) / VL % WS_NV == 1 ? VL : 0, even_ = (pitch) - alone_; \
      if constexpr ((R) > BLOCK) { \
        for (; j + 3 * VL <= even_ && j + 4 * VL != even_; j += 3 * VL) LAYER(3) \
      } else { \
        WS_WIDEST(LAYER) \
        for (; j + 3 * VL <= even_; j += 3 * VL) LAYER(3) \
      } \
      for (; j + 2 * VL <= even_; j += 2 * VL) LAYER(2) \
      if (alone_) LAYER(1) }
  // rows that go through together: those of one block, or of two where there are registers for their tile
  struct One { enum { ROWS = BLOCK }; };
  #if defined(__AVX512F__)
    struct Two { enum { ROWS = 2 * BLOCK }; };
    #define WS_WIDEST(LAYER) for (; j + 4 * VL <= even_; j += 4 * VL) LAYER(4)
  #else
    typedef One Two;
    #define WS_WIDEST(LAYER)
  #endif
#endif
