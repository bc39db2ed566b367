// The one function of BLAS that MLX's CPU back end calls in float32, handed on to OpenBLAS as PyPI has it, where every
// name has a prefix. Arguments are those of the reference: https://www.netlib.org/blas/cblas.h
//
// Decoding several texts at once multiplies a few rows by each weight, which should take as long as the weight takes to
// read. OpenBLAS copies it into another order first, which takes longer, so such products are computed here. Compiled
// for the processor at hand.

#include <algorithm>
#include <type_traits>
#include <vector>

enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };

namespace {

// Floats in a register, and registers for sums: all but those for what is multiplied.
#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12;
#elif defined(__aarch64__)
constexpr int LANES = 4, SUMS = 24;
#else
constexpr int LANES = 4, SUMS = 12;
#endif
typedef float Register __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define UNROLL _Pragma("GCC unroll 32")

constexpr int FEW = 16;     // rows of A; with more, OpenBLAS is as fast on two cores. These are computed by one
constexpr int GROUP = 8;    // of them at a time
constexpr int TILE = 192;   // columns of B for all groups, so that the second finds them in the cache,
constexpr int AT_ONCE = 8;  // or rows of B

// C = alpha A B + beta C for A (m, k), B (k, n) and C (m, n), seen from one place in A, B and C.
struct Product {
  int k;
  float alpha, beta;
  const float *a;
  long a_row, a_column;  // floats from one row, and from one column, to the next
  const float *b;
  bool b_transposed;  // rows of `b` are columns of B
  long ldb;
  float *c;
  long ldc;

  Product at(int row, int column = 0) const {
    Product there = *this;
    there.a += row * a_row;
    there.b += column * (b_transposed ? ldb : 1);
    there.c += row * ldc + column;
    return there;
  }
  void put(int row, int column, float sum) const {
    float &to = c[row * ldc + column];
    to = alpha * sum + (beta == 0 ? 0 : beta * to);
  }
};

// M rows of A times R rows of `b`, a sum for each lane. `a` has LANES floats of each row, then the next of each, ...
template <int M, int R>
__attribute__((noinline)) void dots_by_lane(int k, const float *a, const float *b, long ldb, Register *to) {
  Register sums[R][M] = {};
  for (int i = 0; i < k; i += LANES) {
    Register weights[R];
    UNROLL for (int r = 0; r < R; r++) {
      weights[r] = *(const Register *)(b + r * ldb + i);
      __builtin_prefetch(b + (r + R) * ldb + i);
    }
    UNROLL for (int m = 0; m < M; m++) {
      Register x = *(const Register *)(a + (long)i * M + m * LANES);
      UNROLL for (int r = 0; r < R; r++) sums[r][m] += weights[r] * x;
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) to[r * M + m] = sums[r][m];
}

template <int M, int R> void dots(const Product &p, const float *a) {
  alignas(64) Register sums[R * M];
  int whole = p.k / LANES * LANES;
  dots_by_lane<M, R>(whole, a, p.b, p.ldb, sums);
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float *lanes = (float *)(sums + r * M + m);
      UNROLL for (int half = LANES / 2; half; half /= 2) UNROLL for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
      for (int i = whole; i < p.k; i++) lanes[0] += p.a[m * p.a_row + i * p.a_column] * p.b[r * p.ldb + i];
      p.put(m, r, lanes[0]);
    }
}

// C = A B for M rows of A, if rows of `b` are columns of B.
template <int M> void multiply_dots(const Product &p, int n) {
  struct alignas(64) CacheLine { float floats[16]; };  // a register read across two lines takes twice as long
  static thread_local std::vector<CacheLine> lines;
  lines.resize((long)p.k * M / 16 + 1);
  float *a = reinterpret_cast<float *>(lines.data()), *to = a;
  for (int i = 0; i + LANES <= p.k; i += LANES)
    for (int m = 0; m < M; m++)
      for (int l = 0; l < LANES; l++) *to++ = p.a[m * p.a_row + (i + l) * p.a_column];
  constexpr int R = M > 1 && 2 * M <= SUMS ? 2 : 1;
  int j = 0;
  for (; j + R <= n; j += R) dots<M, R>(p.at(0, j), a);
  for (; j < n; j++) dots<M, 1>(p.at(0, j), a);
}

// M rows of A times R rows of `b`, from row i on, added to C. Memory is read along R rows side by side.
template <int M, int R> void add_rows(const Product &p, int n, int i) {
  float a[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) a[r][m] = p.alpha * p.a[m * p.a_row + (i + r) * p.a_column];
  const float *b = p.b + i * p.ldb;
  int j = 0;
  for (; j + LANES <= n; j += LANES) {
    Register sums[M];
    UNROLL for (int m = 0; m < M; m++) sums[m] = *(const Register *)(p.c + m * p.ldc + j);
    UNROLL for (int r = 0; r < R; r++) {
      Register weights = *(const Register *)(b + r * p.ldb + j);
      __builtin_prefetch(b + (r + R) * p.ldb + j);
      UNROLL for (int m = 0; m < M; m++) sums[m] += a[r][m] * weights;
    }
    UNROLL for (int m = 0; m < M; m++) *(Register *)(p.c + m * p.ldc + j) = sums[m];
  }
  for (; j < n; j++)
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) p.c[m * p.ldc + j] += a[r][m] * b[r * p.ldb + j];
}

// Calls `work` with `rows`, at most M, as a constant.
template <int M = GROUP, class Work> void with_constant(int rows, Work work) {
  if constexpr (M > 1)
    if (rows < M) return with_constant<M - 1>(rows, work);
  work(std::integral_constant<int, M>());
}

void multiply_few(int m, int n, const Product &p) {
  if (p.b_transposed) {
    int tile = m > GROUP ? TILE : n;
    for (int column = 0; column < n; column += tile)
      for (int row = 0; row < m; row += GROUP)
        with_constant(std::min(m - row, GROUP),
                      [&](auto M) { multiply_dots<M>(p.at(row, column), std::min(n - column, tile)); });
    return;
  }
  for (int row = 0; row < m; row++)
    for (int j = 0; j < n; j++) p.c[row * p.ldc + j] = p.beta == 0 ? 0 : p.beta * p.c[row * p.ldc + j];
  int i = 0;
  for (; i + AT_ONCE <= p.k; i += AT_ONCE)
    for (int row = 0; row < m; row += GROUP)
      with_constant(std::min(m - row, GROUP), [&](auto M) { add_rows<M, AT_ONCE>(p.at(row), n, i); });
  for (; i < p.k; i++)
    for (int row = 0; row < m; row += GROUP)
      with_constant(std::min(m - row, GROUP), [&](auto M) { add_rows<M, 1>(p.at(row), n, i); });
}
}  // namespace

extern "C" {

void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                       const float *b, int ldb, float beta, float *c, int ldc);
void scipy_cblas_sgemv(int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x,
                       int incx, float beta, float *y, int incy);

// C = alpha A B + beta C for A (m, k) and B (k, n), each perhaps transposed.
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  if (order == ROW_MAJOR && m == 1) {
    bool whole = trans_b == AS_IT_IS;
    scipy_cblas_sgemv(order, whole ? TRANSPOSED : AS_IT_IS, whole ? k : n, whole ? n : k, alpha, b, ldb, a,
                      trans_a == AS_IT_IS ? 1 : lda, beta, c, 1);
  } else if (order == ROW_MAJOR && n == 1) {
    bool whole = trans_a == AS_IT_IS;
    scipy_cblas_sgemv(order, trans_a, whole ? m : k, whole ? k : m, alpha, a, lda, b,
                      trans_b == AS_IT_IS ? ldb : 1, beta, c, ldc);
  } else if (order == ROW_MAJOR && m <= FEW) {
    bool whole = trans_a == AS_IT_IS;
    multiply_few(m, n, {k, alpha, beta, a, whole ? lda : 1, whole ? 1 : lda, b, trans_b == TRANSPOSED, ldb, c, ldc});
  } else {
    scipy_cblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}
}
