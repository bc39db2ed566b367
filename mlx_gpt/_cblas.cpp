// The one function of BLAS that MLX's CPU back end calls in float32, handed on to OpenBLAS as PyPI has it, where every
// name has a prefix. Arguments are those of the reference: https://www.netlib.org/blas/cblas.h

enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };

extern "C" {

void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                       const float *b, int ldb, float beta, float *c, int ldc);
void scipy_cblas_sgemv(int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x,
                       int incx, float beta, float *y, int incy);

// C = alpha A B + beta C for A (m, k) and B (k, n), each perhaps transposed. OpenBLAS first copies A and B into an order
// of its own, which takes longer than the product itself where one of them is a few rows and the other a weight.
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  const int few_rows = 16;           // with more, the copy no longer matters
  const long uncopied = 100L * 100 * 100;  // with AVX-512, it copies nothing for products of up to m n k = 100^3
  if (order == ROW_MAJOR && m == 1) {
    bool whole = trans_b == AS_IT_IS;
    scipy_cblas_sgemv(order, whole ? TRANSPOSED : AS_IT_IS, whole ? k : n, whole ? n : k, alpha, b, ldb, a,
                      trans_a == AS_IT_IS ? 1 : lda, beta, c, 1);
  } else if (order == ROW_MAJOR && n == 1) {
    bool whole = trans_a == AS_IT_IS;
    scipy_cblas_sgemv(order, trans_a, whole ? m : k, whole ? k : m, alpha, a, lda, b,
                      trans_b == AS_IT_IS ? ldb : 1, beta, c, ldc);
  } else if (order == ROW_MAJOR && m <= few_rows) {
    long most = uncopied / m / (k > 0 ? k : 1) / 16 * 16; // columns at a time
    most = most < 16 ? 16 : most > 64 ? 64 : most;
    for (int start = 0; start < n; start += most) {
      int columns = n - start < most ? n - start : most;
      scipy_cblas_sgemm(order, trans_a, trans_b, m, columns, k, alpha, a, lda,
                        b + (trans_b == AS_IT_IS ? 1L : ldb) * start, ldb, beta, c + start, ldc);
    }
  } else {
    scipy_cblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}
}
