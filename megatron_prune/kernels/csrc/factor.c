/* U with U^T U = H^-1, upper triangular, of a symmetric positive definite H [size, size], float64, row-major, in place:
 * H = R R^T with R upper, and U = R^-1. By halves,
 *
 *     H = [H11 H12; . H22]    R22 R22^T = H22, U22 = R22^-1    R12 = H12 U22^T
 *                             R11 R11^T = H11 - R12 R12^T      U12 = -U11 R12 U22
 *
 * so that all but the leaves is products, which leave out what is zero or not wanted: 2/3 size^3 operations. Their
 * panels are packed side by side, and every element is summed by the same operations in the same order whatever the
 * number of threads: the result does not depend on it, bit for bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 8, ROWS = 8 }; /* ROWS x VECTORS sums in registers, of 32 and 16 */
#else
enum { LANES = 4, ROWS = 4 };
#endif
enum { VECTORS = 3, COLUMNS = VECTORS * LANES, DEPTH = 512, BAND = 64, LEAF = 32 };

typedef double lanes __attribute__((vector_size(LANES * sizeof(double)), aligned(sizeof(double)), may_alias));

typedef struct {
    const double *at;
    int64_t down, right; /* from an element to the next of its column, of its row */
} matrix;

/* Where a product need not look. */
typedef enum {
    LEFT_UPPER,  /* left[i][k] = 0 for k < i */
    RIGHT_UPPER, /* right[k][j] = 0 for k > j */
    RIGHT_LOWER, /* right[k][j] = 0 for k < j */
    UPPER_ONLY   /* what comes below the diagonal of the result is never read */
} shape;

/* out[r][c] += sign * sum over k of left[k][r] right[k][c], of packed panels; rows x columns of it are there. */
static void kernel(const double *left, const double *right, int64_t depth, double sign, double *out, int64_t stride,
                   int64_t rows, int64_t columns)
{
    lanes sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = (lanes){0};
    for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                sum[r][v] += left[k * ROWS + r] * ((const lanes *)(right + k * COLUMNS))[v];
    if (rows == ROWS && columns == COLUMNS) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                ((lanes *)(out + r * stride))[v] += sign * sum[r][v];
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            out[r * stride + c] += sign * ((const double *)sum[r])[c];
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

/* `count` lines of `depth` elements into panels of `wide` lines, element by element; missing lines are zero. */
static void pack(const double *at, int64_t across, int64_t along, int64_t count, int64_t depth, int wide, double *panel)
{
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < wide; i++)
            panel[k * wide + i] = i < count ? at[i * across + k * along] : 0.0;
}

/* out [rows, columns] += sign * left [rows, depth] right [depth, columns]. `packed`: DEPTH x columns, rounded up. */
static void multiply(shape s, double sign, matrix left, matrix right, double *out, int64_t stride, int64_t rows,
                     int64_t columns, int64_t depth, double *packed, int threads)
{
    (void)threads; /* unused without OpenMP */
#pragma omp parallel num_threads(threads)
    for (int64_t k = 0; k < depth; k += DEPTH) {
        int64_t deep = least(DEPTH, depth - k);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < columns; j += COLUMNS)
            pack(right.at + k * right.down + j * right.right, right.right, right.down, least(COLUMNS, columns - j),
                 deep, COLUMNS, packed + j * DEPTH);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < rows; i += BAND) {
            double band[BAND * DEPTH] __attribute__((aligned(64)));
            int64_t high = least(BAND, rows - i);
            for (int64_t r = 0; r < high; r += ROWS)
                pack(left.at + (i + r) * left.down + k * left.right, left.down, left.right, least(ROWS, high - r), deep,
                     ROWS, band + r * DEPTH);
            for (int64_t j = 0; j < columns; j += COLUMNS)
                for (int64_t r = 0; r < high; r += ROWS) {
                    int64_t from = s == LEFT_UPPER ? i + r : s == RIGHT_LOWER ? j : 0;
                    int64_t to = s == RIGHT_UPPER ? j + COLUMNS : depth;
                    if (s == UPPER_ONLY && j + COLUMNS <= i + r)
                        continue;
                    from = most(from - k, 0);
                    to = least(to - k, deep);
                    if (from < to)
                        kernel(band + r * DEPTH + from * ROWS, packed + j * DEPTH + from * COLUMNS, to - from, sign,
                               out + (i + r) * stride + j, stride, least(ROWS, high - r), least(COLUMNS, columns - j));
                }
        }
    }
}

static void clear(double *at, int64_t stride, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r++)
        memset(at + r * stride, 0, (size_t)columns * sizeof(double));
}

/* to [columns, rows] = from [rows, columns] turned, in squares that stay in the cache. */
static void turn(const double *from, double *to, int64_t stride, int64_t rows, int64_t columns, int threads)
{
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < columns; i += LEAF)
        for (int64_t j = 0; j < rows; j += LEAF)
            for (int64_t c = i; c < least(i + LEAF, columns); c++)
                for (int64_t r = j; r < least(j + LEAF, rows); r++)
                    to[c * stride + r] = from[r * stride + c];
}

/* The whole thing for a small matrix; 0 when there is no R. */
static int leaf(double *h, int64_t stride, int64_t size)
{
    double inverse[LEAF][LEAF];
    for (int64_t j = size - 1; j >= 0; j--) {
        double *low = h + j * stride;
        for (int64_t i = j; i >= 0; i--) {
            double *row = h + i * stride, sum = 0.0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = j + 1; k < size; k++)
                sum += row[k] * low[k];
            if (i == j && !(row[j] - sum > 0.0))
                return 0;
            row[j] = i == j ? sqrt(row[j] - sum) : (row[j] - sum) / low[j];
        }
    }
    for (int64_t i = 0; i < size; i++) {
        memset(inverse[i], 0, sizeof(inverse[i]));
        inverse[i][i] = 1.0;
        for (int64_t k = i; k < size; k++) {
            const double *row = h + k * stride;
            double x = inverse[i][k] /= row[k];
            for (int64_t j = k + 1; j < size; j++)
                inverse[i][j] -= x * row[j];
        }
    }
    for (int64_t i = 0; i < size; i++)
        memcpy(h + i * stride, inverse[i], (size_t)size * sizeof(double));
    return 1;
}

/* What comes between is kept turned, in the corner below the diagonal, where the result is zero. */
static int factor(double *h, int64_t stride, int64_t size, double *packed, int threads)
{
    if (size <= LEAF)
        return leaf(h, stride, size);
    int64_t first = up(size / 2, ROWS), second = size - first;
    double *above = h + first, *below = h + first * stride, *last = below + first;
    matrix turned = {above, 1, stride}, kept = {below, stride, 1}, kept_turned = {below, 1, stride};
    matrix u11_turned = {h, 1, stride}, u22 = {last, stride, 1};
    if (!factor(last, stride, second, packed, threads))
        return 0;
    clear(below, stride, second, first); /* R12^T = U22 H12^T */
    multiply(LEFT_UPPER, 1.0, u22, turned, below, stride, second, first, second, packed, threads);
    multiply(UPPER_ONLY, -1.0, kept_turned, kept, h, stride, first, first, second, packed, threads);
    clear(above, stride, first, second); /* R12 U22 */
    multiply(RIGHT_UPPER, 1.0, kept_turned, u22, above, stride, first, second, second, packed, threads);
    if (!factor(h, stride, first, packed, threads))
        return 0;
    clear(below, stride, second, first); /* U12^T = -(R12 U22)^T U11^T */
    multiply(RIGHT_LOWER, -1.0, turned, u11_turned, below, stride, second, first, first, packed, threads);
    turn(below, above, stride, second, first, threads);
    clear(below, stride, second, first);
    return 1;
}

/* float64 numbers that `second_order_factor` needs as working space. */
int64_t second_order_space(int64_t size) { return DEPTH * up(up(size / 2, ROWS), COLUMNS); }

/* Only the upper triangle of h is looked at; what is below becomes zero. 0 when h is not positive definite. */
int second_order_factor(double *h, int64_t size, double *space, int threads)
{
    return factor(h, size, size, space, threads);
}
