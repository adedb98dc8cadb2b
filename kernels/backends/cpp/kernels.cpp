// The dilated affinity and its propagation for one image, on a CPU. library.py compiles it, __init__.py calls it.
//
// A map is stored row by row, [height][channels][pitch]. In a row, the image starts at column `reach`; its border is
// replicated by `reach` columns to both sides, and further to the right where it is narrower than MIN_WIDTH.
// An affinity is [height][neighbours][width]. Neighbour n of a pixel is (dy[n], dx[n]) away, with |dx[n]| <= reach.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int REGISTER = 64; // bytes
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

// Pixels of a map that may be read at once, whatever its width.
constexpr int MIN_WIDTH = 32;

// Channels whose sums stay in registers together, with room for a weight and an operand beside them.
constexpr int MAX_GROUP = 12;

struct Map {
    int64_t channels, height, width, reach, pitch;
};

struct Neighbours {
    int64_t count;
    const int64_t *dy, *dx;
};

// The numbers of a Variant of variants.py; `position` holds every neighbour's position term.
struct Variant {
    double guard, weight, samples;
    int64_t sigma_power, power;
    const double *position;
};

template <typename Real> struct Types;
template <> struct Types<float> {
    typedef float Vector __attribute__((vector_size(REGISTER)));
    typedef uint32_t Bits __attribute__((vector_size(REGISTER)));
    static constexpr int fraction = 23, bias = 127, lowest = -87;
};
template <> struct Types<double> {
    typedef double Vector __attribute__((vector_size(REGISTER)));
    typedef uint64_t Bits __attribute__((vector_size(REGISTER)));
    static constexpr int fraction = 52, bias = 1023, lowest = -708;
};
template <typename Real> using Vector = typename Types<Real>::Vector;
template <typename Real> constexpr int LANES = REGISTER / sizeof(Real);

// Addresses are those of any pixel. By memcpy, because a reference to a Vector has its full alignment in clang.
template <typename Real> static Vector<Real> load(const Real *address)
{
    Vector<Real> vector;
    std::memcpy(&vector, address, sizeof vector);
    return vector;
}
template <typename Real> static void store(Real *address, Vector<Real> vector)
{
    std::memcpy(address, &vector, sizeof vector);
}

// Where a row's next block starts: the last one overlaps the one before, unless it is the only one.
static int64_t block_start(int64_t x, int64_t block, int64_t width)
{
    return x + block <= width || width < block ? x : width - block;
}

// Return where pixel 0 of a row reads its neighbours. Rows beyond the border are the border's.
template <typename Real>
static std::vector<const Real *> find_rows(const Real *map, const Map &size, const Neighbours &neighbours, int64_t y)
{
    std::vector<const Real *> rows(neighbours.count);
    for (int64_t n = 0; n < neighbours.count; n++) {
        int64_t row = y + neighbours.dy[n];
        row = row < 0 ? 0 : row < size.height ? row : size.height - 1;
        rows[n] = map + row * size.channels * size.pitch + size.reach + neighbours.dx[n];
    }
    return rows;
}

// e^x for x <= 0, to a relative 2e-7. NaN stays NaN.
template <typename Real> static Vector<Real> exp_of_negative(Vector<Real> x)
{
    using T = Types<Real>;
    // Adding it rounds, and leaves the integer in the lowest bits.
    constexpr Real magic = uint64_t(3) << (T::fraction - 1);
    constexpr double ln2_high = 0.693359375, factorials[] = {720, 120, 24, 6, 2, 1, 1};
    x = x < T::lowest ? Vector<Real>{} + T::lowest : x;
    Vector<Real> shifted = x * Real(M_LOG2E) + magic, integer = shifted - magic;
    Vector<Real> rest = x - integer * Real(ln2_high) - integer * Real(M_LN2 - ln2_high);
    Vector<Real> series = Vector<Real>{} + Real(1. / 5040);
    for (double factorial : factorials) series = series * rest + Real(1 / factorial);
    typename T::Bits power_of_2 = ((typename T::Bits)shifted + T::bias) << T::fraction;
    return series * (Vector<Real>)power_of_2;
}

// Fill weights[neighbour][pixel] of a block of pixels from column x on. `rows` and `centre` point to column 0.
template <typename Real, int BLOCK>
static void weigh(Real (*weights)[BLOCK], const std::vector<const Real *> &rows, const Real *centre, int64_t x,
                  const Map &size, const Variant &variant)
{
    constexpr int lanes = LANES<Real>, vectors = BLOCK / lanes;
    using V = Vector<Real>;
    const int64_t count = rows.size();

    std::memset(weights, 0, count * sizeof *weights);
    for (int64_t k = 0; k < size.channels; k++) {
        const int64_t first = k * size.pitch + x;
        V middle[vectors], total[vectors] = {}, squares[vectors] = {}, scale[vectors] = {};
        for (int v = 0; v < vectors; v++) middle[v] = load(centre + first + v * lanes);

        // Moments about the centre: exactly zero where the image is flat, and no cancellation however large its offset.
        for (int64_t n = 0; n < count; n++)
            for (int v = 0; v < vectors; v++) {
                V difference = load(rows[n] + first + v * lanes) - middle[v];
                total[v] += difference;
                squares[v] += difference * difference;
            }
        for (int v = 0; v < vectors; v++)
            for (int i = 0; i < lanes; i++) {
                Real variance = (squares[v][i] - total[v][i] * total[v][i] / variant.samples) / (variant.samples - 1);
                variance = variance < 0 ? 0 : variance; // NaN stays NaN
                Real sigma = variant.sigma_power == 0 ? 1 : variant.sigma_power == 1 ? std::sqrt(variance) : variance;
                scale[v][i] = 1 / (variant.guard + variant.weight * sigma); // eq. 8
            }
        for (int64_t n = 0; n < count; n++)
            for (int v = 0; v < vectors; v++) {
                V difference = (load(rows[n] + first + v * lanes) - middle[v]) * scale[v];
                Real *exponent = &weights[n][v * lanes];
                V distance = variant.power == 2 ? difference * difference : difference < 0 ? -difference : difference;
                store(exponent, load(exponent) - distance);
            }
    }

    // Softmax over the neighbours.
    for (int v = 0; v < vectors; v++) {
        V highest = load(&weights[0][v * lanes]), sum = {};
        for (int64_t n = 1; n < count; n++) {
            V exponent = load(&weights[n][v * lanes]);
            highest = exponent > highest ? exponent : highest;
        }
        for (int64_t n = 0; n < count; n++) {
            Real *exponent = &weights[n][v * lanes];
            V weight = exp_of_negative<Real>((load(exponent) - highest) / Real(size.channels));
            store(exponent, weight);
            sum += weight;
        }
        for (int64_t n = 0; n < count; n++) {
            Real *weight = &weights[n][v * lanes];
            store(weight, load(weight) / sum + Real(variant.position[n]));
        }
    }
}

template <typename Real>
static void affinity(const Real *image, float *out, const Map &size, const Neighbours &neighbours, const Variant &variant,
                     int64_t threads)
{
    constexpr int block = 2 * LANES<Real>;
    static_assert(block <= MIN_WIDTH);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t y = 0; y < size.height; y++) {
        const auto rows = find_rows(image, size, neighbours, y);
        std::vector<Real> scratch(neighbours.count * block);
        auto weights = (Real(*)[block])scratch.data();
        const Real *centre = image + y * size.channels * size.pitch + size.reach;
        float *row = out + y * neighbours.count * size.width;
        const int64_t pixels = size.width < block ? size.width : block;
        for (int64_t x = 0; x < size.width; x += block) {
            const int64_t start = block_start(x, block, size.width);
            weigh<Real, block>(weights, rows, centre, start, size, variant);
            for (int64_t n = 0; n < neighbours.count; n++)
                for (int64_t i = 0; i < pixels; i++) row[n * size.width + start + i] = weights[n][i];
        }
    }
}

// Sum a register of pixels over their neighbours in `group` channels. What the next row of pixels needs is fetched
// meanwhile: its weights, its result, and `lowest`, the only one of its neighbours' rows that was not read before.
template <int group, typename Real>
static void sum(Real *out, const Real *lowest, const std::vector<const Real *> &rows, int64_t first,
                const Real *weights, int64_t stride, const Map &size)
{
    const int64_t count = rows.size();
    Vector<Real> sums[group] = {};
    for (int64_t n = 0; n < count; n++) {
        const Vector<Real> weight = load(weights + n * stride);
        __builtin_prefetch(weights + (count + n) * stride);
        for (int c = 0; c < group; c++) sums[c] += weight * load(rows[n] + first + c * size.pitch);
    }
    for (int c = 0; c < group; c++) {
        const int64_t pixels = first + c * size.pitch;
        store(out + pixels, sums[c]);
        __builtin_prefetch(out + size.channels * size.pitch + pixels, 1);
        __builtin_prefetch(lowest + pixels);
    }
}

template <int group = MAX_GROUP, typename... Arguments>
static void sum_channels(int64_t channels, const Arguments &...arguments)
{
    if (channels == group)
        sum<group>(arguments...);
    else if constexpr (group > 1)
        sum_channels<group - 1>(channels, arguments...);
}

// Sum a row of pixels over their neighbours, and replicate the border to its sides.
template <typename Real>
static void propagate_row(Real *result, const Real *masks, const Real *affinity, const Map &size,
                          const Neighbours &neighbours, int64_t y)
{
    constexpr int lanes = LANES<Real>;
    const int64_t row_size = size.channels * size.pitch;
    const auto rows = find_rows(masks, size, neighbours, y);
    Real *out = result + y * row_size + size.reach;
    const Real *lowest = masks + (y + 1 + size.reach) * row_size + size.reach;
    const Real *weights = affinity + y * neighbours.count * size.width;
    int64_t stride = size.width;

    std::vector<Real> wide; // of narrow maps, where a register of weights would reach beyond the affinity
    if (size.width < lanes) {
        wide.resize(neighbours.count * lanes);
        for (int64_t n = 0; n < neighbours.count; n++)
            std::memcpy(&wide[n * lanes], weights + n * stride, stride * sizeof(Real));
        weights = wide.data();
        stride = lanes;
    }

    const int64_t groups = (size.channels + MAX_GROUP - 1) / MAX_GROUP;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t channel = size.channels * g / groups, next = size.channels * (g + 1) / groups;
        for (int64_t x = 0; x < size.width; x += lanes) {
            const int64_t start = block_start(x, lanes, size.width), first = channel * size.pitch + start;
            sum_channels(next - channel, out, lowest, rows, first, weights + start, stride, size);
        }
    }

    for (int64_t c = 0; c < size.channels; c++) {
        Real *first = out + c * size.pitch, *last = first + size.width - 1;
        for (int64_t x = 1; x <= size.reach; x++) {
            first[-x] = *first;
            last[x] = *last;
        }
    }
}

// `from` is summed into `to`, and back, as often as there are iterations.
template <typename Real>
static void propagate(Real *from, Real *to, const Real *affinity, const Map &size, const Neighbours &neighbours,
                      int64_t iterations, int64_t threads)
{
#pragma omp parallel num_threads(threads)
    for (int64_t t = 0; t < iterations; t++) {
#pragma omp for schedule(static) // so that a thread's rows stay in its cache
        for (int64_t y = 0; y < size.height; y++)
            propagate_row(t % 2 ? from : to, t % 2 ? to : from, affinity, size, neighbours, y);
    }
}

#define EXPORT(Real)                                                                                                 \
    extern "C" void affinity_##Real(const Real *image, float *out, const Map *size, const Neighbours *neighbours,    \
                                    const Variant *variant, int64_t threads)                                               \
    {                                                                                                                \
        affinity(image, out, *size, *neighbours, *variant, threads);                                                    \
    }                                                                                                                \
    extern "C" void propagate_##Real(Real *from, Real *to, const Real *affinity, const Map *size,                    \
                                     const Neighbours *neighbours, int64_t iterations, int64_t threads)              \
    {                                                                                                                \
        propagate(from, to, affinity, *size, *neighbours, iterations, threads);                                      \
    }
EXPORT(float)
EXPORT(double)
