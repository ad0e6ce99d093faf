/* What lowered kernels call and no C library has. */
#include <stdint.h>
#include <string.h>

/* Rounds to nearest even, as the hardware does. _Float16 stands for bfloat16: both are returned in
   the low half of a vector register, and GCC 12 knows no type of the latter's name. */
_Float16 __truncsfbf2(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        bits |= 0x400000;
    else
        bits += 0x7fff + (bits >> 16 & 1);
    uint16_t high = bits >> 16;
    _Float16 result;
    memcpy(&result, &high, 2);
    return result;
}

typedef struct {
    int64_t rank;
    int64_t *descriptor; /* allocated, aligned, offset, sizes, strides */
} Memref;

/* Copies elements of `bytes` between strided buffers of equal shape. */
void memrefCopy(int64_t bytes, Memref *source, Memref *target) {
    int64_t rank = source->rank, index[8] = {0}, elements = 1;
    int64_t *from = source->descriptor, *to = target->descriptor, *sizes = from + 3;
    char *read = (char *)from[1] + from[2] * bytes, *write = (char *)to[1] + to[2] * bytes;
    for (int64_t axis = 0; axis < rank; axis++)
        elements *= sizes[axis];
    for (int64_t i = 0; i < elements; i++) {
        int64_t at = 0, put = 0;
        for (int64_t axis = 0; axis < rank; axis++) {
            at += index[axis] * from[3 + rank + axis];
            put += index[axis] * to[3 + rank + axis];
        }
        memcpy(write + put * bytes, read + at * bytes, bytes);
        for (int64_t axis = rank - 1; axis >= 0 && ++index[axis] == sizes[axis]; axis--)
            index[axis] = 0;
    }
}
