// Gaussian filters over position and colour on a permutohedral lattice, on a CPU, and the mean field of a dense CRF.
// Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010.
// library.py compiles it together with the other sources; lattice.py calls it.
//
// A pixel lies in a simplex of D + 1 corners. Filtering adds its values to the corners (splat), blurs the lattice along
// its D + 1 axes, and reads the corners again (slice), with the same barycentric weights.
//
// Pixels are cut into bands, and every band has its own rows of values, one per vertex that its pixels touch. Bands run
// in parallel, and their rows are summed in the order of the bands. The bands depend on the number of pixels only, so
// that results do not depend on the number of threads.
//
// The wheels run with the C++ runtime library of GCC 4.8. The code therefore uses no std::vector, aligned new or
// std::exception_ptr: if a newer GCC compiles them, they need its newer library.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace {

constexpr int BLOCK = 16; // pixels that are located at once
constexpr int64_t BAND_PIXELS = 1 << 14, MAX_BANDS = 32;
constexpr int MAX_CHANNELS = 24;                  // of a row of values
constexpr int64_t PARALLEL_PIXELS = 1 << 12;      // smaller images use one thread
constexpr int64_t PARALLEL_VALUES = 1 << 18;      // on the vertices; blurring fewer uses one thread, too
constexpr float LARGEST_COORDINATE = 1 << 20;     // beyond it, float32 has less than 3 bits for the place in a simplex

// The result of a call. The errors are thrown inside of this file, and no other exceptions are.
enum Status { DONE = 0, NO_MEMORY = 1, TOO_FINE = 2, TOO_LARGE = 3 };

template <typename Body> Status guarded(const Body &body)
{
    try {
        body();
        return DONE;
    } catch (Status status) {
        return status;
    }
}

// Call body(i) for every i < count, on several threads if `threads` allows it. Throw the worst error that `body` threw.
template <typename Body> void parallel(int64_t count, int64_t threads, const Body &body)
{
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
    int worst = DONE;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(max : worst)
    for (int64_t i = 0; i < count; i++) {
        const int status = guarded([&] { body(i); });
        worst = status > worst ? status : worst;
    }
    if (worst != DONE) throw Status(worst);
}

// Split [0, count) into ranges and call body(first, last) for each.
template <typename Body> void parallel_ranges(int64_t count, int64_t threads, const Body &body)
{
    constexpr int64_t grain = 1024;
    const int64_t most = (count + grain - 1) / grain;
    const int64_t ranges = threads <= 1 ? 1 : most < 4 * threads ? most : 4 * threads;
    parallel(ranges, threads, [&](int64_t i) { body(i * count / ranges, (i + 1) * count / ranges); });
}

// An array aligned to cache lines. Numbers in it are not initialised.
template <typename T> class Array {
    T *memory = nullptr;

public:
    int64_t size = 0;

    Array() = default;
    explicit Array(int64_t size) : size(size)
    {
        void *pointer;
        size_t bytes;
        if (__builtin_mul_overflow(size ? size : 1, sizeof(T), &bytes) || posix_memalign(&pointer, 64, bytes))
            throw NO_MEMORY;
        memory = (T *)pointer;
        for (T &element : *this) new (&element) T;
    }
    Array(Array &&other) { *this = std::move(other); }
    Array &operator=(Array &&other)
    {
        std::swap(memory, other.memory);
        std::swap(size, other.size);
        return *this;
    }
    ~Array()
    {
        for (T &element : *this) element.~T();
        std::free(memory);
    }
    T *get() const { return memory; }
    T *begin() const { return memory; }
    T *end() const { return memory + size; }
    T &operator[](int64_t i) const { return memory[i]; }
};

// A hash table of the vertices found so far, by their keys, with open addressing.
template <typename Key> class Vertices {
    struct Slot {
        Key key;
        int32_t vertex;
    };
    Array<Slot> slots; // at most half of them are taken
    Array<Key> keys;
    uint64_t mask;

    uint64_t place(Key key) const
    {
        uint64_t mixed = uint64_t(key);
        if constexpr (sizeof(Key) > 8) mixed ^= uint64_t(key >> 64) * 0xff51afd7ed558ccdu;
        mixed *= 0x9e3779b97f4a7c15u;
        return (mixed ^ mixed >> 32) & mask;
    }
    void resize(int64_t size)
    {
        slots = Array<Slot>(size);
        for (Slot &slot : slots) slot = {0, -1};
        mask = size - 1;
        Array<Key> larger(size / 2 + 1);
        for (int64_t v = 0; v < count; v++) {
            uint64_t i = place(keys[v]);
            while (slots[i].vertex >= 0) i = (i + 1) & mask;
            slots[i] = {keys[v], int32_t(v)};
            larger[v] = keys[v];
        }
        keys = std::move(larger);
    }

public:
    int64_t count = 0;

    explicit Vertices(int64_t expected)
    {
        int64_t size = 2048;
        while (size < 2 * expected) size *= 2;
        resize(size);
    }
    Key key(int64_t vertex) const { return keys[vertex]; }
    int32_t find(Key key) const
    {
        for (uint64_t i = place(key);; i = (i + 1) & mask) {
            if (slots[i].vertex < 0 || slots[i].key == key) return slots[i].vertex;
        }
    }
    int32_t find_or_add(Key key)
    {
        for (uint64_t i = place(key);; i = (i + 1) & mask) {
            if (slots[i].vertex >= 0) {
                if (slots[i].key == key) return slots[i].vertex;
                continue;
            }
            const int32_t vertex = int32_t(count);
            slots[i] = {key, vertex};
            keys[count++] = key;
            if (2 * count > slots.size) resize(2 * slots.size);
            return vertex;
        }
    }
};

struct Band {
    int64_t first, last;     // its pixels
    int64_t offset = 0;      // of its first row among the rows of all bands
    Array<int32_t> vertices; // of its rows
};

struct Lattice {
    int64_t pixels = 0, vertices = 0, band_rows = 0;
    int corners = 0;
    bool finite = true;             // else every sum is NaN
    double scale = 1;
    Array<Band> bands;
    Array<int32_t> rows;           // [pixels][corners], in the pixel's band
    Array<float> weights;          // [pixels][corners]
    Array<int32_t> neighbours;     // [corners][vertices][2]; `vertices` where there is none
    Array<int32_t> first, merged;  // of vertex v: the bands' rows merged[first[v]:first[v + 1]]
};

// The features of the pixels: position alone, or position and the three colours of an image.
struct Points {
    const float *image; // [3][height][width] or null
    int64_t height, width;
    double sigma_xy, sigma_rgb;
};

typedef float Floats __attribute__((vector_size(4 * BLOCK)));
typedef int32_t Ints __attribute__((vector_size(4 * BLOCK)));

// How the keys of vertices are packed: a coordinate's quotient by D + 1 above the others, the remainder lowest.
template <int D, typename Key> struct Packing {
    int32_t lowest[D];
    Key stride[D + 1]; // 0 for the last coordinate, which follows from the others
    Key all;           // sum of the strides
};

// The place of a block of pixels in the lattice.
template <int D> struct Place {
    Floats weight[D + 1];
    Ints quotient[D + 1]; // of the corner with remainder 0
    Ints axis[D + 1];     // the step from corner r - 1 to r
};

template <int D> void elevate(const Floats (&feature)[D], Floats (&elevated)[D + 1])
{
    Floats sum = {};
    for (int i = D; i > 0; i--) {
        const float scale = std::sqrt(2. / 3) * (D + 1) / std::sqrt(double(i) * (i + 1));
        const Floats scaled = feature[i - 1] * scale;
        elevated[i] = sum - float(i) * scaled;
        sum += scaled;
    }
    elevated[0] = sum;
}

template <int D> void locate(const Floats (&feature)[D], Place<D> &place)
{
    constexpr float magic = 3 << 22; // adding it rounds to an integer
    Floats elevated[D + 1], rest[D + 1], sum = {};
    Ints rank[D + 1] = {};
    elevate<D>(feature, elevated);
    Floats rounded[D + 1];
    for (int i = 0; i <= D; i++) {
        rounded[i] = (elevated[i] * (1.f / (D + 1)) + magic) - magic;
        rest[i] = elevated[i] - rounded[i] * (D + 1);
        sum += rounded[i];
    }
    const Ints excess = __builtin_convertvector(sum, Ints);
    for (int i = 0; i < D; i++)
        for (int j = i + 1; j <= D; j++) {
            const Ints below = rest[i] < rest[j]; // -1 where true
            rank[i] -= below;
            rank[j] += below + 1;
        }
    for (int i = 0; i <= D; i++) {
        rank[i] += excess;
        const Ints low = rank[i] < 0, high = rank[i] > D;
        rank[i] += (low & (D + 1)) - (high & (D + 1));
        const Ints moved = high - low; // 1 up, -1 down
        place.quotient[i] = __builtin_convertvector(rounded[i], Ints) + moved;
        rest[i] = rest[i] * (1.f / (D + 1)) - __builtin_convertvector(moved, Floats);
    }
    Floats sorted[D + 1];
    for (int r = 0; r <= D; r++) {
        Ints bits = {}, axis = {};
        for (int i = 0; i <= D; i++) {
            const Ints here = rank[i] == r;
            bits |= here & (Ints)rest[i];
            axis |= here & i;
        }
        sorted[r] = (Floats)bits;
        if (r > 0) place.axis[D + 1 - r] = axis;
    }
    place.weight[0] = 1 + sorted[D] - sorted[0];
    for (int k = 1; k <= D; k++) place.weight[k] = sorted[D - k] - sorted[D - k + 1];
}

// The features of the pixels from `pixel` on. Lanes after the last pixel repeat it.
template <int D> void load_features(const Points &points, int64_t pixel, Floats (&feature)[D])
{
    const int64_t pixels = points.height * points.width;
    int64_t y = pixel / points.width, x = pixel % points.width;
    const float scale_xy = 1 / points.sigma_xy;
    for (int lane = 0; lane < BLOCK; lane++) {
        feature[0][lane] = x * scale_xy;
        feature[1][lane] = y * scale_xy;
        if (pixel + lane + 1 < pixels && ++x == points.width) x = 0, y++;
    }
    if constexpr (D > 2) {
        const float scale_rgb = 1 / points.sigma_rgb;
        for (int k = 0; k < D - 2; k++) {
            const float *plane = points.image + k * pixels;
            if (pixel + BLOCK <= pixels)
                std::memcpy(&feature[2 + k], plane + pixel, sizeof(Floats));
            else
                for (int lane = 0; lane < BLOCK; lane++)
                    feature[2 + k][lane] = plane[pixel + lane < pixels ? pixel + lane : pixels - 1];
            feature[2 + k] *= scale_rgb;
        }
    }
}

// Bounds of the quotients of all pixels. Returns false if a feature is not finite.
template <int D> bool find_bounds(const Points &points, double (&low)[D + 1], double (&high)[D + 1])
{
    double least[D] = {}, most[D] = {};
    most[0] = (points.width - 1) / points.sigma_xy;
    most[1] = (points.height - 1) / points.sigma_xy;
    const int64_t pixels = points.height * points.width;
    for (int k = 2; k < D; k++) {
        const float *plane = points.image + (k - 2) * pixels;
        float lowest = plane[0], highest = plane[0], nothing = 0;
        for (int64_t i = 0; i < pixels; i++) {
            lowest = plane[i] < lowest ? plane[i] : lowest;
            highest = plane[i] > highest ? plane[i] : highest;
            nothing += plane[i] * 0; // NaN if the value is not finite
        }
        if (nothing != 0) return false;
        least[k] = lowest / points.sigma_rgb;
        most[k] = highest / points.sigma_rgb;
    }
    double sum_low = 0, sum_high = 0;
    for (int i = D; i >= 0; i--) {
        low[i] = sum_low;
        high[i] = sum_high;
        if (i == 0) break;
        const double scale = std::sqrt(2. / 3) * (D + 1) / std::sqrt(double(i) * (i + 1));
        low[i] -= i * scale * most[i - 1];
        high[i] -= i * scale * least[i - 1];
        sum_low += scale * least[i - 1];
        sum_high += scale * most[i - 1];
    }
    for (int i = 0; i <= D; i++) {
        if (!(std::fabs(low[i]) < LARGEST_COORDINATE && std::fabs(high[i]) < LARGEST_COORDINATE)) throw TOO_FINE;
        // Rounding, and a step to a neighbour, move a quotient by at most 3.
        low[i] = std::floor(low[i] / (D + 1)) - 3;
        high[i] = std::ceil(high[i] / (D + 1)) + 3;
    }
    return true;
}

template <int D> int count_bits(const double (&low)[D + 1], const double (&high)[D + 1], int (&bits)[D])
{
    int total = 3; // the remainder
    for (int i = 0; i < D; i++) {
        bits[i] = std::ilogb(high[i] - low[i] + 1) + 1;
        total += bits[i];
    }
    return total;
}

template <int D, typename Key>
void fill(Lattice &lattice, const Points &points, const Packing<D, Key> &packing, int64_t threads)
{
    constexpr int corners = D + 1;
    Array<Array<Key>> keys(lattice.bands.size);
    parallel(lattice.bands.size, threads, [&](int64_t b) {
        const Band &band = lattice.bands[b];
        Vertices<Key> vertices((band.last - band.first) / 2);
        Place<D> place;
        Floats feature[D];
        Key last[corners];
        int32_t last_row[corners];
        for (int r = 0; r < corners; r++) last[r] = ~Key(0), last_row[r] = -1;
        for (int64_t pixel = band.first; pixel < band.last; pixel += BLOCK) {
            load_features<D>(points, pixel, feature);
            locate<D>(feature, place);
            const int lanes = band.last - pixel < BLOCK ? int(band.last - pixel) : BLOCK;
            for (int lane = 0; lane < lanes; lane++) {
                const int64_t entry = (pixel + lane) * corners;
                Key key = 0;
                for (int i = 0; i < D; i++) key += Key(place.quotient[i][lane] - packing.lowest[i]) * packing.stride[i];
                for (int r = 0; r < corners; r++) {
                    if (r > 0) key += 1 - packing.stride[place.axis[r][lane]];
                    if (key != last[r]) {
                        last[r] = key;
                        last_row[r] = vertices.find_or_add(key);
                    }
                    lattice.rows[entry + r] = last_row[r];
                    lattice.weights[entry + r] = place.weight[r][lane];
                }
            }
        }
        keys[b] = Array<Key>(vertices.count);
        for (int64_t v = 0; v < vertices.count; v++) keys[b][v] = vertices.key(v);
    });

    // Vertices are numbered by their first pixel.
    int64_t most = 0;
    for (const auto &list : keys) most += list.size;
    if (most >= INT32_MAX) throw TOO_LARGE;
    Vertices<Key> all(lattice.bands.size == 1 ? 0 : most / 2);
    if (lattice.bands.size == 1) {
        for (Key key : keys[0]) all.find_or_add(key);
    } else {
        for (int64_t b = 0; b < keys.size; b++) {
            const Array<Key> own = std::move(keys[b]);
            Band &band = lattice.bands[b];
            band.offset = lattice.band_rows;
            lattice.band_rows += own.size;
            band.vertices = Array<int32_t>(own.size);
            for (int64_t row = 0; row < own.size; row++) band.vertices[row] = all.find_or_add(own[row]);
        }
    }
    const int64_t count = lattice.vertices = all.count;

    lattice.neighbours = Array<int32_t>(corners * count * 2);
    parallel(corners, threads, [&](int64_t axis) {
        int32_t *pairs = lattice.neighbours.get() + axis * count * 2;
        for (int64_t i = 0; i < 2 * count; i++) pairs[i] = int32_t(count);
        const Key step = 1 - packing.stride[axis], wrapped = packing.all - packing.stride[axis] - D;
        for (int64_t v = 0; v < count; v++) {
            const Key key = all.key(v);
            const int32_t next = all.find(key + (int(key & 7) < D ? step : wrapped));
            if (next >= 0) pairs[2 * v] = next, pairs[2 * next + 1] = int32_t(v);
        }
    });
    if (lattice.bands.size == 1) return;

    lattice.first = Array<int32_t>(count + 1);
    lattice.merged = Array<int32_t>(lattice.band_rows);
    std::memset(lattice.first.get(), 0, (count + 1) * sizeof(int32_t));
    for (const Band &band : lattice.bands)
        for (int32_t v : band.vertices) lattice.first[v + 1]++;
    for (int64_t v = 0; v < count; v++) lattice.first[v + 1] += lattice.first[v];
    Array<int32_t> next(count);
    std::memcpy(next.get(), lattice.first.get(), count * sizeof(int32_t));
    for (const Band &band : lattice.bands)
        for (int64_t row = 0; row < band.vertices.size; row++)
            lattice.merged[next[band.vertices[row]]++] = int32_t(band.offset + row);
}

template <int D, typename Key>
void pack_and_fill(Lattice &lattice, const Points &points, const double (&low)[D + 1], const int (&bits)[D],
                   int64_t threads)
{
    Packing<D, Key> packing;
    int shift = 3;
    packing.all = 0;
    for (int i = 0; i < D; i++) {
        packing.lowest[i] = int32_t(low[i]);
        packing.stride[i] = Key(1) << shift;
        packing.all += packing.stride[i];
        shift += bits[i];
    }
    // The remainder has 3 bits of its own: strides are multiples of 8.
    packing.stride[D] = 0;
    fill<D, Key>(lattice, points, packing, threads);
}

template <int D> void build(Lattice &lattice, const Points &points, int64_t threads)
{
    const int64_t pixels = lattice.pixels = points.height * points.width;
    lattice.corners = D + 1;
    if (pixels > INT32_MAX / (D + 1)) throw TOO_LARGE;
    double low[D + 1], high[D + 1];
    int bits[D];
    lattice.finite = find_bounds<D>(points, low, high);
    if (!lattice.finite) return;

    int64_t count = pixels / BAND_PIXELS;
    count = count < 1 ? 1 : count > MAX_BANDS ? MAX_BANDS : count;
    lattice.bands = Array<Band>(count);
    for (int64_t b = 0; b < count; b++) {
        lattice.bands[b].first = pixels * b / count / BLOCK * BLOCK;
        lattice.bands[b].last = b + 1 == count ? pixels : pixels * (b + 1) / count / BLOCK * BLOCK;
    }
    lattice.rows = Array<int32_t>(pixels * (D + 1));
    lattice.weights = Array<float>(pixels * (D + 1));
    const int total = count_bits<D>(low, high, bits);
    if (total <= 64)
        pack_and_fill<D, uint64_t>(lattice, points, low, bits, threads);
    else if (total <= 128)
        pack_and_fill<D, unsigned __int128>(lattice, points, low, bits, threads);
    else
        throw TOO_FINE;
}

// A row of values: COUNT vectors of LANES channels.
template <typename Real, int LANES> struct VectorOf {
    typedef Real Type __attribute__((vector_size(sizeof(Real) * LANES)));
};

template <typename Real_, int LANES_, int COUNT_> struct Row {
    using Real = Real_;
    static constexpr int lanes = LANES_, count = COUNT_, channels = LANES_ * COUNT_;
    using Vector = typename VectorOf<Real, LANES_>::Type;
    Vector v[COUNT_];
};

// The values on the vertices of a lattice: `splat` writes to `written`, then `blur` runs, then `slice` reads `read`.
template <typename R> struct Field {
    const Lattice *lattice = nullptr;
    bool banded = false;
    Array<R> vertices[2];
    Array<R> bands[2]; // where there are several bands
    R *read = nullptr, *written = nullptr;

    Field() = default;
    explicit Field(const Lattice &lattice) : lattice(&lattice), banded(lattice.bands.size > 1)
    {
        for (auto &rows : vertices) rows = Array<R>(lattice.vertices + 1);
        if (banded)
            for (auto &rows : bands) rows = Array<R>(lattice.band_rows);
        read = banded ? bands[0].get() : vertices[0].get();
        written = banded ? bands[1].get() : vertices[1].get();
    }
    int64_t offset(const Band &band) const { return banded ? band.offset : 0; }
    void clear(const Band &band) const
    {
        const int64_t count = banded ? band.vertices.size : lattice->vertices;
        std::memset((void *)(written + offset(band)), 0, count * sizeof(R));
    }
    void blur(bool reversed, int64_t threads);
};

template <typename R> void Field<R>::blur(bool reversed, int64_t threads)
{
    const int64_t count = lattice->vertices;
    threads = count * R::channels < PARALLEL_VALUES ? 1 : threads;
    R *from = banded ? vertices[0].get() : written, *to = banded ? vertices[1].get() : read;
    if (banded)
        parallel_ranges(count, threads, [&](int64_t first, int64_t last) {
            for (int64_t v = first; v < last; v++) {
                R sum = written[lattice->merged[lattice->first[v]]];
                for (int32_t i = lattice->first[v] + 1; i < lattice->first[v + 1]; i++)
                    for (int k = 0; k < R::count; k++) sum.v[k] += written[lattice->merged[i]].v[k];
                from[v] = sum;
            }
        });
    std::memset((void *)(from + count), 0, sizeof(R));
    std::memset((void *)(to + count), 0, sizeof(R));
    for (int i = 0; i < lattice->corners; i++) {
        const int axis = reversed ? lattice->corners - 1 - i : i;
        const int32_t *pairs = lattice->neighbours.get() + axis * count * 2;
        parallel_ranges(count, threads, [&](int64_t first, int64_t last) {
            for (int64_t v = first; v < last; v++) {
                const R &one = from[pairs[2 * v]], &other = from[pairs[2 * v + 1]];
                for (int k = 0; k < R::count; k++)
                    to[v].v[k] = from[v].v[k] + typename R::Real(0.5) * (one.v[k] + other.v[k]);
            }
        });
        std::swap(from, to);
    }
    if (!banded) {
        read = from;
        written = to;
        return;
    }
    parallel(lattice->bands.size, threads, [&](int64_t b) {
        const Band &band = lattice->bands[b];
        R *rows = read + band.offset;
        for (int64_t i = 0; i < band.vertices.size; i++) rows[i] = from[band.vertices[i]];
    });
}

template <int CORNERS, typename R> void splat(const Field<R> &field, const Band &band, int64_t pixel, const R &row)
{
    R *rows = field.written + field.offset(band);
    const int32_t *index = field.lattice->rows.get() + pixel * CORNERS;
    const float *weights = field.lattice->weights.get() + pixel * CORNERS;
    for (int r = 0; r < CORNERS; r++) {
        const typename R::Real weight = weights[r];
        R &target = rows[index[r]];
        for (int k = 0; k < R::count; k++) target.v[k] += weight * row.v[k];
    }
}

template <int CORNERS, typename R> R slice(const Field<R> &field, const Band &band, int64_t pixel)
{
    const R *rows = field.read + field.offset(band);
    const int32_t *index = field.lattice->rows.get() + pixel * CORNERS;
    const float *weights = field.lattice->weights.get() + pixel * CORNERS;
    R sum = {};
    for (int r = 0; r < CORNERS; r++) {
        const typename R::Real weight = weights[r];
        for (int k = 0; k < R::count; k++) sum.v[k] += weight * rows[index[r]].v[k];
    }
    return sum;
}

template <typename R> void splat(const Field<R> &field, const Band &band, int64_t pixel, const R &row)
{
    field.lattice->corners == 3 ? splat<3>(field, band, pixel, row) : splat<6>(field, band, pixel, row);
}

template <typename R> R slice(const Field<R> &field, const Band &band, int64_t pixel)
{
    return field.lattice->corners == 3 ? slice<3>(field, band, pixel) : slice<6>(field, band, pixel);
}

// Read and write the channels of a pixel, which are stored in planes.
template <typename R>
void load(R &row, const typename R::Real *values, int64_t pixels, int channels, typename R::Real rest)
{
    typename R::Real *to = (typename R::Real *)&row;
    for (int c = 0; c < R::channels; c++) to[c] = c < channels ? values[c * pixels] : rest;
}

template <typename R> void store(const R &row, typename R::Real *values, int64_t pixels, int channels)
{
    const typename R::Real *from = (const typename R::Real *)&row;
    for (int c = 0; c < channels; c++) values[c * pixels] = from[c];
}

template <typename R>
void filter(const Lattice &lattice, const typename R::Real *values, typename R::Real *out, int channels,
            bool transposed, int64_t threads)
{
    using Real = typename R::Real;
    const int64_t pixels = lattice.pixels;
    Field<R> field(lattice);
    parallel(lattice.bands.size, threads, [&](int64_t b) {
        const Band &band = lattice.bands[b];
        field.clear(band);
        R row;
        for (int64_t pixel = band.first; pixel < band.last; pixel++) {
            load(row, values + pixel, pixels, channels, Real(0));
            splat(field, band, pixel, row);
        }
    });
    field.blur(transposed, threads);
    const Real scale = lattice.scale;
    parallel(lattice.bands.size, threads, [&](int64_t b) {
        const Band &band = lattice.bands[b];
        for (int64_t pixel = band.first; pixel < band.last; pixel++) {
            R row = slice(field, band, pixel);
            for (int k = 0; k < R::count; k++) row.v[k] *= scale;
            store(row, out + pixel, pixels, channels);
        }
    });
}

template <typename Real> void fill_with_nan(Real *out, int64_t count)
{
    for (int64_t i = 0; i < count; i++) out[i] = NAN;
}

template <typename Real>
void filter_channels(const Lattice &lattice, const Real *values, Real *out, int64_t channels, bool transposed,
                     int64_t threads)
{
    if (!lattice.finite) return fill_with_nan(out, channels * lattice.pixels);
    // Few widths of rows are compiled. Float64 has one only, because its speed does not matter.
    const int64_t widest = sizeof(Real) == 4 ? MAX_CHANNELS : 4;
    for (int64_t c = 0; c < channels; c += widest) {
        const int count = channels - c < widest ? int(channels - c) : int(widest);
        const Real *from = values + c * lattice.pixels;
        Real *to = out + c * lattice.pixels;
        if constexpr (sizeof(Real) == 8)
            filter<Row<Real, 4, 1>>(lattice, from, to, count, transposed, threads);
        else if (count == 1)
            filter<Row<Real, 1, 1>>(lattice, from, to, count, transposed, threads);
        else if (count <= 4)
            filter<Row<Real, 4, 1>>(lattice, from, to, count, transposed, threads);
        else if (count <= 8)
            filter<Row<Real, 8, 1>>(lattice, from, to, count, transposed, threads);
        else
            filter<Row<Real, 8, 3>>(lattice, from, to, count, transposed, threads);
    }
}

// Divide by the square root of the filtered map of ones, before and after filtering. The weights contain both factors.
void normalise(Lattice &lattice, int64_t threads)
{
    if (!lattice.finite) return;
    Array<float> ones(lattice.pixels), sums(lattice.pixels);
    for (int64_t i = 0; i < lattice.pixels; i++) ones[i] = 1;
    filter_channels(lattice, ones.get(), sums.get(), 1, false, threads);
    for (int64_t i = 0; i < lattice.pixels; i++) {
        const float factor = 1 / std::sqrt(sums[i] + 1e-20f);
        for (int r = 0; r < lattice.corners; r++) lattice.weights[i * lattice.corners + r] *= factor;
    }
}

// e^x for x <= 0, with a relative error of 2e-7; 0 for x < -75, where e^x is below 3e-33. NaN stays NaN.
template <typename V, typename I> V exp_of_negative(V x)
{
    constexpr float magic = 3 << 22, ln2_high = 0.693359375f, lowest = -75;
    constexpr double factorials[] = {720, 120, 24, 6, 2, 1, 1};
    const I too_low = x < lowest;
    x = (V)(((I)x & ~too_low)); // 0 where x is too low
    const V shifted = x * float(M_LOG2E) + magic, integer = shifted - magic;
    const V rest = x - integer * ln2_high - integer * float(M_LN2 - double(ln2_high));
    V series = V{} + float(1. / 5040);
    for (double factorial : factorials) series = series * rest + float(1 / factorial);
    const I power_of_2 = ((I)shifted + 127) << 23;
    return (V)((I)(series * (V)power_of_2) & ~too_low);
}

template <typename R> void softmax(R &row)
{
    using V = typename R::Vector;
    typedef int32_t I __attribute__((vector_size(4 * R::lanes)));
    V largest = row.v[0];
    for (int k = 1; k < R::count; k++) largest = row.v[k] > largest ? row.v[k] : largest;
    float highest = largest[0];
    for (int i = 1; i < R::lanes; i++) highest = largest[i] > highest ? largest[i] : highest;
    V sums = {};
    for (int k = 0; k < R::count; k++) {
        row.v[k] = exp_of_negative<V, I>(row.v[k] - highest);
        sums += row.v[k];
    }
    float sum = sums[0];
    for (int i = 1; i < R::lanes; i++) sum += sums[i];
    const float factor = 1 / sum;
    for (int k = 0; k < R::count; k++) row.v[k] *= factor;
}

template <typename R>
void mean_field(const Array<const Lattice *> &lattices, const double *strengths, const float *logits, float *out,
                int channels, int64_t num_iter, int64_t threads)
{
    const Lattice &any = *lattices[0];
    const int64_t pixels = any.pixels;
    Array<Field<R>> fields(lattices.size);
    for (int64_t f = 0; f < fields.size; f++) fields[f] = Field<R>(*lattices[f]);
    Array<R> rows(pixels);

    for (int64_t i = 0; i <= num_iter; i++) {
        if (i > 0)
            for (auto &field : fields) field.blur(false, threads);
        parallel(any.bands.size, threads, [&](int64_t b) {
            for (auto &field : fields)
                if (i < num_iter) field.clear(field.lattice->bands[b]);
            for (int64_t pixel = any.bands[b].first; pixel < any.bands[b].last; pixel++) {
                if (i == 0) load(rows[pixel], logits + pixel, pixels, channels, -INFINITY);
                R row = rows[pixel];
                if (i > 0)
                    for (int64_t f = 0; f < fields.size; f++) {
                        const float strength = strengths[f] * fields[f].lattice->scale;
                        const R sum = slice(fields[f], fields[f].lattice->bands[b], pixel);
                        for (int k = 0; k < R::count; k++) row.v[k] += strength * sum.v[k];
                    }
                softmax(row);
                if (i == num_iter)
                    store(row, out + pixel, pixels, channels);
                else
                    for (auto &field : fields) splat(field, field.lattice->bands[b], pixel, row);
            }
        });
    }
}

// Images run in parallel if there are enough of them, else the bands of one image after the other. Few pixels run on
// one thread: a forked child does not have the threads of its parent, and would wait for them forever.
template <typename Body> void for_images(int64_t batch, int64_t pixels, int64_t threads, const Body &body)
{
    const bool by_image = threads > 1 && batch >= threads && batch * pixels >= PARALLEL_PIXELS;
    const int64_t inner = pixels < PARALLEL_PIXELS ? 1 : threads;
    parallel(batch, by_image ? threads : 1, [&](int64_t b) { body(b, by_image ? 1 : inner); });
}

} // namespace

using Lattices = Array<Lattice>;

// Filter values [batch][channels][height][width]. A single lattice serves the whole batch.
template <typename Real>
static int filter_batch(const Lattices *lattices, const Real *values, Real *out, int64_t batch, int64_t channels,
                        int64_t transposed, int64_t threads)
{
    return guarded([&] {
        for_images(batch, (*lattices)[0].pixels, threads, [&](int64_t b, int64_t inner) {
            const Lattice &lattice = (*lattices)[lattices->size == 1 ? 0 : b];
            const int64_t first = b * channels * lattice.pixels;
            filter_channels<Real>(lattice, values + first, out + first, channels, transposed, inner);
        });
    });
}

extern "C" {

// Make the lattices of a batch of images [batch][3][height][width] (null: of positions alone) in *result.
int lattices_new(Lattices **result, const float *images, int64_t batch, int64_t height, int64_t width, double sigma_xy,
                 double sigma_rgb, int64_t normalised, int64_t threads)
{
    return guarded([&] {
        Lattices lattices(batch);
        for_images(batch, height * width, threads, [&](int64_t b, int64_t inner) {
            Lattice &lattice = lattices[b];
            const int64_t pixels = height * width;
            const Points points{images ? images + b * 3 * pixels : nullptr, height, width, sigma_xy, sigma_rgb};
            images ? build<5>(lattice, points, inner) : build<2>(lattice, points, inner);
            const int d = lattice.corners - 1;
            // The integral of the Gaussian, over that of a vertex: its volume, times the 2 of every axis' blur.
            double power = 1; // (4 pi / 3)^(d / 2), without pow: that of new C libraries is not in old ones
            for (int i = 0; i < d; i++) power *= std::sqrt(4 * M_PI / 3);
            lattice.scale = power * std::sqrt(d + 1.) / (1 << (d + 1));
            if (normalised) normalise(lattice, inner);
        });
        *result = new (std::nothrow) Lattices(std::move(lattices));
        if (!*result) throw NO_MEMORY;
    });
}

void lattices_free(Lattices *lattices) { delete lattices; }

// The number of vertices of all lattices.
int64_t lattices_vertices(const Lattices *lattices)
{
    int64_t count = 0;
    for (const Lattice &lattice : *lattices) count += lattice.vertices;
    return count;
}

int lattices_filter_float(const Lattices *lattices, const float *values, float *out, int64_t batch, int64_t channels,
                          int64_t transposed, int64_t threads)
{
    return filter_batch(lattices, values, out, batch, channels, transposed, threads);
}

int lattices_filter_double(const Lattices *lattices, const double *values, double *out, int64_t batch,
                           int64_t channels, int64_t transposed, int64_t threads)
{
    return filter_batch(lattices, values, out, batch, channels, transposed, threads);
}

// Write the marginals of `num_iter` steps of mean field [batch][channels][height][width], of at most 24 channels, for
// sums of `count` filters with the given strengths. count is at least 1.
int lattices_mean_field(const Lattices *const *filters, const double *strengths, int64_t count, const float *logits,
                        float *out, int64_t batch, int64_t channels, int64_t num_iter, int64_t threads)
{
    return guarded([&] {
        for_images(batch, (*filters[0])[0].pixels, threads, [&](int64_t b, int64_t inner) {
            Array<const Lattice *> lattices(count);
            for (int64_t f = 0; f < count; f++) lattices[f] = &(*filters[f])[filters[f]->size == 1 ? 0 : b];
            const int64_t pixels = lattices[0]->pixels, first = b * channels * pixels;
            const float *from = logits + first;
            float *to = out + first;
            for (const Lattice *lattice : lattices)
                if (!lattice->finite) return fill_with_nan(to, channels * pixels);
            const int c = int(channels);
            if (c <= 4) mean_field<Row<float, 4, 1>>(lattices, strengths, from, to, c, num_iter, inner);
            else if (c <= 8) mean_field<Row<float, 8, 1>>(lattices, strengths, from, to, c, num_iter, inner);
            else if (c <= 16) mean_field<Row<float, 8, 2>>(lattices, strengths, from, to, c, num_iter, inner);
            else mean_field<Row<float, 8, 3>>(lattices, strengths, from, to, c, num_iter, inner);
        });
    });
}
}
