/* Which pairs of a neighbour list are within the cutoff: what pairs.py does with numpy, in one pass.
   Compiled without fused multiply-add, so that both give the same bits. */
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { BEADS = 32 }; /* structures at once: a bit for each */

static int within(const double *a, const double *b, const double *t, int64_t stride, double square)
{
    double x = b[0] - a[0] + t[0];
    double y = b[stride] - a[stride] + t[1];
    double z = b[2 * stride] - a[2 * stride] + t[2];
    return x * x + y * y + z * z <= square;
}

/* Bit p of near[q]: whether pair q of structure p is within the cutoff; counts: how many are, of each structure.
   beads: (n_atoms, 3, stride), stride a multiple of four if it is not 1; across: (n_pairs, 3). */
void near_pairs(int64_t n_pairs, int64_t count, int64_t stride, const double *restrict beads,
                const int64_t *restrict first, const int64_t *restrict second, const double *restrict across,
                double square, uint32_t *restrict near, int64_t *restrict counts)
{
    uint32_t all = count < BEADS ? (UINT32_C(1) << count) - 1 : ~UINT32_C(0), sums[BEADS] = {0};
    for (int64_t q = 0; q < n_pairs; q++) {
        const double *a = beads + 3 * stride * first[q], *b = beads + 3 * stride * second[q];
        const double *t = across + 3 * q;
        uint32_t mask = 0;
#ifdef __AVX2__
        if (stride > 1) {
            __m256d tx = _mm256_set1_pd(t[0]), ty = _mm256_set1_pd(t[1]), tz = _mm256_set1_pd(t[2]);
            __m256d limit = _mm256_set1_pd(square);
            for (int64_t p = 0; p < stride; p += 4) {
                const double *c = a + p, *d = b + p;
                __m256d x = _mm256_sub_pd(_mm256_loadu_pd(d), _mm256_loadu_pd(c));
                __m256d y = _mm256_sub_pd(_mm256_loadu_pd(d + stride), _mm256_loadu_pd(c + stride));
                __m256d z = _mm256_sub_pd(_mm256_loadu_pd(d + 2 * stride), _mm256_loadu_pd(c + 2 * stride));
                x = _mm256_add_pd(x, tx);
                y = _mm256_add_pd(y, ty);
                z = _mm256_add_pd(z, tz);
                x = _mm256_add_pd(_mm256_mul_pd(x, x), _mm256_mul_pd(y, y));
                x = _mm256_add_pd(x, _mm256_mul_pd(z, z));
                mask |= (uint32_t)_mm256_movemask_pd(_mm256_cmp_pd(x, limit, _CMP_LE_OQ)) << p;
            }
        } else
#endif
            for (int64_t p = 0; p < count; p++)
                mask |= (uint32_t)within(a + p, b + p, t, stride, square) << p;
        near[q] = mask & all;
    }
    for (int64_t q = 0; q < n_pairs; q++)
        for (int p = 0; p < BEADS; p++)
            sums[p] += near[q] >> p & 1;
    for (int64_t p = 0; p < count; p++)
        counts[p] = sums[p];
}

#ifdef __AVX2__
static uint8_t places[256][8]; /* of the bits of a byte, one behind another */

__attribute__((constructor)) static void fill_places(void)
{
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0, k = 0; bit < 8; bit++)
            if (byte >> bit & 1)
                places[byte][k++] = (uint8_t)bit;
}
#endif

/* Numbers of the edges with bit p, to chosen, which has room for eight more; eight zeros follow the bits. */
static void choose(int64_t n_edges, int p, const uint32_t *restrict bits, int32_t *restrict chosen)
{
    int64_t k = 0;
#ifdef __AVX2__
    __m128i shift = _mm_cvtsi32_si128(31 - p);
    for (int64_t e = 0; e < n_edges; e += 8) {
        __m256i v = _mm256_sll_epi32(_mm256_loadu_si256((const __m256i *)(bits + e)), shift);
        int mask = _mm256_movemask_ps(_mm256_castsi256_ps(v));
        __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)places[mask]));
        _mm256_storeu_si256((__m256i *)(chosen + k), _mm256_add_epi32(at, _mm256_set1_epi32((int)e)));
        k += __builtin_popcount((unsigned)mask);
    }
#else
    for (int64_t e = 0; e < n_edges; e++) {
        chosen[k] = (int32_t)e;
        k += bits[e] >> p & 1;
    }
#endif
}

/* The edges of structure p go to found + 2 starts[p] as (2, counts[p]), their shifts to turns + 3 starts[p].
   ends: both atoms of each edge; shifts of edge e: table + 3 codes[e]; bits, chosen: room for n_edges + 8. */
void take_edges(int64_t n_edges, int64_t count, const int32_t *restrict pair, const uint32_t *restrict near,
                const int32_t *restrict ends, const int32_t *restrict codes, const double *restrict table,
                const int64_t *restrict starts, const int64_t *restrict counts, uint32_t *restrict bits,
                int32_t *restrict chosen, int64_t *restrict found, double *restrict turns)
{
    for (int64_t e = 0; e < n_edges; e++)
        bits[e] = near[pair[e]];
    memset(bits + n_edges, 0, 8 * sizeof *bits);
    for (int p = 0; p < count; p++) {
        choose(n_edges, p, bits, chosen);
        int64_t many = counts[p], *i = found + 2 * starts[p], *j = i + many;
        double *s = turns + 3 * starts[p];
        for (int64_t q = 0; q < many; q++) {
            int64_t e = chosen[q];
            i[q] = ends[2 * e];
            j[q] = ends[2 * e + 1];
            memcpy(s + 3 * q, table + 3 * (int64_t)codes[e], 3 * sizeof(double));
        }
    }
}
