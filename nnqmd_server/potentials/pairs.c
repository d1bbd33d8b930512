/* Which pairs of a neighbour list are within the cutoff: what pairs.py does with numpy, in one pass.
   Compiled without fused multiply-add, so that both give the same bits. */
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64 };

/* beads: (n_atoms, 3, count); across: (n_pairs, 3); near: (count, n_pairs); room: BLOCK * count bytes. */
void near_pairs(int64_t n_pairs, int64_t count, const double *restrict beads, const int64_t *restrict first,
                const int64_t *restrict second, const double *restrict across, double square,
                uint8_t *restrict room, uint8_t *restrict near)
{
    if (count == 1) { /* one structure: the arithmetic runs over the pairs */
        for (int64_t q = 0; q < n_pairs; q++) {
            const double *a = beads + 3 * first[q], *b = beads + 3 * second[q], *t = across + 3 * q;
            double x = b[0] - a[0] + t[0], y = b[1] - a[1] + t[1], z = b[2] - a[2] + t[2];
            near[q] = x * x + y * y + z * z <= square;
        }
        return;
    }
    for (int64_t low = 0; low < n_pairs; low += BLOCK) {
        int64_t many = n_pairs - low < BLOCK ? n_pairs - low : BLOCK;
        for (int64_t q = 0; q < many; q++) {
            const double *a = beads + 3 * count * first[low + q], *b = beads + 3 * count * second[low + q];
            const double *t = across + 3 * (low + q);
            uint8_t *out = room + count * q;
            for (int64_t p = 0; p < count; p++) {
                double x = b[p] - a[p] + t[0];
                double y = b[count + p] - a[count + p] + t[1];
                double z = b[2 * count + p] - a[2 * count + p] + t[2];
                out[p] = x * x + y * y + z * z <= square;
            }
        }
        for (int64_t p = 0; p < count; p++)
            for (int64_t q = 0; q < many; q++)
                near[p * n_pairs + low + q] = room[count * q + p];
    }
}

/* The edges of structure p go to found + 2 starts[p] as (2, counts[p]), their shifts to turns + 3 starts[p];
   chosen: room for n_edges + 1 numbers. */
void take_edges(int64_t n_edges, int64_t n_pairs, int64_t count, const int32_t *restrict pair,
                const uint8_t *restrict near, const int64_t *restrict edges, const double *restrict shifts,
                const int64_t *restrict starts, const int64_t *restrict counts, int32_t *restrict chosen,
                int64_t *restrict found, double *restrict turns)
{
    for (int64_t p = 0; p < count; p++) {
        const uint8_t *within = near + p * n_pairs;
        int64_t many = counts[p], k = 0;
        for (int64_t e = 0; e < n_edges; e++) {
            chosen[k] = (int32_t)e;
            k += within[pair[e]];
        }
        int64_t *i = found + 2 * starts[p], *j = i + many;
        double *s = turns + 3 * starts[p];
        for (int64_t q = 0; q < many; q++) {
            i[q] = edges[chosen[q]];
            j[q] = edges[n_edges + chosen[q]];
        }
        for (int64_t q = 0; q < many; q++)
            memcpy(s + 3 * q, shifts + 3 * (int64_t)chosen[q], 3 * sizeof(double));
    }
}
