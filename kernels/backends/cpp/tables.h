// The code that affinity.cpp, propagation.cpp and labels.cpp share: vectors, threads, workspaces and tables.
//
// Maps are copied to tables [height][channels][pitch]. In a row of a table, the image starts at column `left`, and its
// border is replicated on both sides, so that a neighbour is read like any other pixel. The transposed propagation
// has zeros there instead.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
constexpr int REGISTER = 64; // bytes
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int LINE = 64; // bytes of a cache line

struct Neighbours {
    int64_t count, reach;
    const int64_t *dy, *dx; // offset of neighbour n; |dx[n]| <= reach
    const int64_t *by_dx;   // the neighbours from the leftmost to the rightmost
};

template <typename Real> struct Types;
template <> struct Types<float> {
    typedef float Vector __attribute__((vector_size(REGISTER), aligned(sizeof(float)), may_alias));
};
template <> struct Types<double> {
    typedef double Vector __attribute__((vector_size(REGISTER), aligned(sizeof(double)), may_alias));
};
template <typename Real> using Vector = typename Types<Real>::Vector;
template <typename Real> constexpr int LANES = REGISTER / sizeof(Real);

// In templates, clang ignores that the type needs no alignment. GCC compiles memcpy to slow code with AVX2.
template <typename Real> static inline Vector<Real> load(const Real *address)
{
#ifdef __clang__
    Vector<Real> vector;
    std::memcpy(&vector, address, sizeof vector);
    return vector;
#else
    return *(const Vector<Real> *)address;
#endif
}
template <typename Real> static inline void store(Real *address, Vector<Real> vector)
{
#ifdef __clang__
    std::memcpy(address, &vector, sizeof vector);
#else
    *(Vector<Real> *)address = vector;
#endif
}

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// ---- Threads ----

// Call body(thread, threads) in every thread. With one thread, no parallel region is opened, because a forked child
// could not open one.
template <typename Body> static inline void in_parallel([[maybe_unused]] int64_t threads, const Body &body)
{
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    body(0, 1);
}

static inline void wait_for_all([[maybe_unused]] int64_t threads)
{
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
}

// Return the number of threads to use: every thread has at least `grain` of the work.
static inline int64_t limit_threads(int64_t threads, int64_t work, int64_t grain)
{
    return std::clamp<int64_t>(work / grain, 1, std::max<int64_t>(threads, 1));
}

// Cuts memory into arrays that start at a cache line of their own. With no memory, it only measures how much is needed.
struct Workspace {
    uintptr_t base;
    int64_t used = 0;
    template <typename T> T *take(int64_t count)
    {
        T *array = (T *)(base + used);
        used += round_up(count * sizeof(T), LINE);
        return array;
    }
};

// ---- Tables ----

struct Table {
    int64_t channels, height, width, left, pitch;
    template <typename Real> Real *row(Real *table, int64_t y) const { return table + y * channels * pitch + left; }
};

template <typename Real>
static inline Table make_table(int64_t channels, int64_t height, int64_t width, int64_t reach, int64_t right)
{
    constexpr int64_t line = LINE / sizeof(Real);
    const int64_t left = round_up(reach, line);
    // An odd number of lines, so that rows do not share the same few sets of the first-level cache.
    const int64_t lines = divide_up(left + std::max<int64_t>(width, LANES<Real>) + right, line) | 1;
    return {channels, height, width, left, lines * line};
}

// Fill the columns beyond both sides of the image with the border, or with zeros.
template <typename Real> static inline void pad_sides(Real *row, const Table &table, bool zeros)
{
    std::fill(row - table.left, row, zeros ? Real(0) : row[0]);
    std::fill(row + table.width, row + table.pitch - table.left, zeros ? Real(0) : row[table.width - 1]);
}

// Copy row y of an image [channels][height][width] to its table.
template <typename Real>
static inline void read_row(Real *out, const Real *image, const int64_t *strides, int64_t y, const Table &table,
                            bool zeros)
{
    for (int64_t c = 0; c < table.channels; c++, out += table.pitch) {
        const Real *in = image + c * strides[1] + y * strides[2];
        if (strides[3] == 1)
            std::copy_n(in, table.width, out);
        else
            for (int64_t x = 0; x < table.width; x++) out[x] = in[x * strides[3]];
        pad_sides(out, table, zeros);
    }
}

// Point to column 0 of every neighbour's row for the pixels of row y. Rows beyond the border are replaced by the
// border.
template <typename Real>
static inline void find_rows(const Real **rows, const Real *map, const Table &table, const Neighbours &neighbours,
                             int64_t y)
{
    const int64_t stride = table.channels * table.pitch, bottom = table.height - 1, count = neighbours.count;
    const int64_t *dy = neighbours.dy, *dx = neighbours.dx;
    const Real *first = table.row(map, 0);
    for (int64_t n = 0; n < count; n++) { // without branches, so that compilers vectorise it
        const int64_t row = std::min(std::max<int64_t>(y + dy[n], 0), bottom);
        rows[n] = first + (row * stride + dx[n]);
    }
}
