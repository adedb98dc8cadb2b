// The affinity of PAMR and PAR (eq. 8) on a CPU, [batch][height][neighbours][width]. library.py compiles it,
// __init__.py calls it. The code allocates no memory: the caller passes a workspace with the number of bytes that
// `*_workspace` returns.

#include "tables.h"

#include <cmath>

// Minimum work per thread: number of neighbours over all pixels and channels.
constexpr int64_t GRAIN = 1 << 15;

// The numbers of a Variant of variants.py; `position` holds every neighbour's position term.
struct Variant {
    double guard, weight, samples;
    int64_t sigma_power, power;
    const double *position;
};

struct Affinity {
    const void *image; // [batch][channels][height][width], with strides in elements
    int64_t strides[4], batch, channels, height, width;
    float *out;
    Neighbours neighbours;
    Variant variant;
    int64_t threads;
};

// ---- Affinity, eq. 8: softmax over n of -mean_k (|I_ki - I_kn| / (guard + weight sigma_ki^sigma_power))^power ----

// Weights are computed for blocks of this many pixels. Moments and exponents are `Real`, the softmax is float32.
constexpr int BLOCK = 2 * LANES<float>;

// The memory that a thread needs for the weights of a block of pixels.
template <typename Real> struct Scratch {
    const Real *centre, **rows; // column 0 of the row, and of every neighbour's row
    Real (*scales)[BLOCK];      // per channel, like the next two
    Real (*nearest)[BLOCK], (*shifts)[BLOCK];
    Real (*exponents)[BLOCK]; // per neighbour, to the base 2
    float (*weights)[BLOCK];  // of every neighbour
};

// If `a` is NaN, both return b.
template <typename V> static V smaller(V a, V b) { return a < b ? a : b; }
template <typename V> static V larger(V a, V b) { return b < a ? a : b; }

template <typename Real> static Vector<Real> square_root(Vector<Real> x)
{
    Real lanes[LANES<Real>];
    store(lanes, x);
    for (Real &lane : lanes) lane = std::sqrt(lane);
    return load(lanes);
}

// 2^x for x <= 0, with a relative error of 1e-7. NaN stays NaN.
static Vector<float> power_of_2(Vector<float> x)
{
    typedef int32_t Bits __attribute__((vector_size(REGISTER)));
    constexpr float magic = (3 << 22) + 127; // adding it rounds, and leaves the integer + 127 in the lowest bits
    x = larger(Vector<float>{} - 126, x);
    const Vector<float> shifted = x + magic, rest = x - (shifted - magic);
    // The polynomial of degree 6 that comes closest to 2^rest for |rest| <= 1/2.
    Vector<float> series = Vector<float>{} + 1.5345811e-4f;
    for (float coefficient : {1.3399931e-3f, 9.618489e-3f, 5.5503287e-2f, 2.4022647e-1f, 6.9314721e-1f, 1.f})
        series = series * rest + coefficient;
    return series * (Vector<float>)((Bits)shifted << 23); // 2^integer: the lowest bits become its exponent field
}

// Exponents in float32 are exact enough if nothing cancels. With the power 2, s_n = |I_n - I_i| / (...) may be large
// for all neighbours, but only the excess of s_n^2 over the smallest one matters. With m, the value nearest to I_i
// between the lowest and the highest neighbour, I_n - m has the sign of m - I_i, and
//     s_n^2 - s_m^2 = (I_n - m) (I_n - m + 2 (m - I_i)) / (...)^2
// is a product of sums without cancellation.
template <int power, typename Real> constexpr bool FACTORED = power == 2 && sizeof(Real) == sizeof(float);

// Fill, for channel k, scratch.scales with factor / (guard + weight sigma^sigma_power), scratch.nearest with the value
// that differences are taken from, and scratch.shifts with twice its distance from the pixel.
template <int power, typename Real>
static void find_scales(const Scratch<Real> &scratch, int64_t k, int64_t x, int64_t pitch, Real factor,
                        const Affinity &task)
{
    constexpr int lanes = LANES<Real>, vectors = 2;
    const Variant &variant = task.variant;
    const int64_t count = task.neighbours.count;
    const Real *const *rows = scratch.rows;
    for (int first = 0; first < BLOCK; first += vectors * lanes) {
        const int64_t pixel = k * pitch + x + first;
        Vector<Real> middle[vectors], origin[vectors], total[vectors], squares[vectors], low[vectors], high[vectors];
        for (int v = 0; v < vectors; v++) {
            middle[v] = origin[v] = load(scratch.centre + pixel + v * lanes);
            total[v] = squares[v] = Vector<Real>{};
            low[v] = high[v] = load(rows[0] + pixel + v * lanes);
        }
        // Moments are taken about a value in the range of the samples, so that sigma is 0 where all samples are equal
        // and an offset of the image causes no cancellation. The value is the pixel itself if it is a sample, else the
        // mean of one dilation.
        if (variant.samples <= count)
            for (int v = 0; v < vectors; v++) {
                Vector<Real> sum = {};
                for (int n = 1; n < 8; n++) sum += load(rows[n] + pixel + v * lanes) - low[v];
                origin[v] = low[v] + sum / 8;
            }
        for (int64_t n = 0; n < count; n++) {
            const Real *row = rows[n] + pixel;
            for (int v = 0; v < vectors; v++) {
                const Vector<Real> value = load(row + v * lanes), difference = value - origin[v];
                total[v] += difference;
                squares[v] += difference * difference;
                if (FACTORED<power, Real>) {
                    low[v] = smaller(value, low[v]);
                    high[v] = larger(value, high[v]);
                }
            }
        }
        for (int v = 0; v < vectors; v++) {
            const Real samples = variant.samples;
            const Vector<Real> none = {};
            Vector<Real> sigma = (squares[v] - total[v] * total[v] / samples) / (samples - 1);
            sigma = sigma < 0 ? none : sigma; // NaN stays NaN
            if (variant.sigma_power == 1) sigma = square_root<Real>(sigma);
            if (variant.sigma_power == 0) sigma = none + 1;
            const int pixels = first + v * lanes;
            store(scratch.scales[k] + pixels, factor / (Real(variant.guard) + Real(variant.weight) * sigma)); // eq. 8
            Vector<Real> nearest = middle[v];
            if (FACTORED<power, Real>) nearest = smaller(high[v], larger(low[v], middle[v]));
            store(scratch.nearest[k] + pixels, nearest);
            store(scratch.shifts[k] + pixels, 2 * (nearest - middle[v]));
        }
    }
}

// Add the exponents of eq. 8 of `channels` channels, from k on, to those of the earlier channels. Set `least` to the
// smallest exponent of every pixel.
template <int channels, int power, typename Real>
static void add_exponents(const Scratch<Real> &scratch, int64_t k, int64_t x, int64_t pitch, Real *least, int64_t count)
{
    constexpr int lanes = LANES<Real>;
    const Real *const *rows = scratch.rows;
    for (int first = 0; first < BLOCK; first += lanes) {
        Vector<Real> scale[channels], nearest[channels], shift[channels];
        for (int c = 0; c < channels; c++) {
            scale[c] = load(scratch.scales[k + c] + first);
            nearest[c] = load(scratch.nearest[k + c] + first);
            shift[c] = load(scratch.shifts[k + c] + first);
        }
        Vector<Real> smallest = Vector<Real>{} + Real(INFINITY);
        for (int64_t n = 0; n < count; n++) {
            const Real *row = rows[n] + k * pitch + x + first;
            Vector<Real> sum = k ? load(scratch.exponents[n] + first) : Vector<Real>{};
            for (int c = 0; c < channels; c++) {
                const Vector<Real> difference = load(row + c * pitch) - nearest[c], scaled = difference * scale[c];
                if (FACTORED<power, Real>)
                    sum += scaled * ((difference + shift[c]) * scale[c]); // eq. 8
                else if (power == 2)
                    sum += scaled * scaled; // eq. 8
                else
                    sum += larger(scaled, -scaled); // eq. 8
            }
            smallest = smaller(sum, smallest);
            store(scratch.exponents[n] + first, sum);
        }
        store(least + first, smallest);
    }
}

// Load a register of exponents as float32, relative to the smallest one.
static Vector<float> load_relative(const float *exponents, const float *least) { return load(least) - load(exponents); }
static Vector<float> load_relative(const double *exponents, const double *least)
{
    float relative[LANES<float>];
    for (int i = 0; i < LANES<float>; i++) relative[i] = least[i] - exponents[i];
    return load(relative);
}

// Write a block's weights: the softmax of its exponents, and the position term.
template <typename Real>
static void softmax(float *out, int64_t pitch, const Scratch<Real> &scratch, const Real *least, const Affinity &task)
{
    const int64_t count = task.neighbours.count;
    for (int v = 0; v < BLOCK; v += LANES<float>) {
        Vector<float> sum = {};
        for (int64_t n = 0; n < count; n++) {
            const Vector<float> weight = power_of_2(load_relative(scratch.exponents[n] + v, least + v));
            store(scratch.weights[n] + v, weight);
            __builtin_prefetch(out + n * pitch + v, 1);
            sum += weight;
        }
        const Vector<float> inverse = 1 / sum;
        for (int64_t n = 0; n < count; n++)
            store(out + n * pitch + v, load(scratch.weights[n] + v) * inverse + float(task.variant.position[n]));
    }
}

// Write the weights of the block that starts at column x.
template <int power, typename Real>
static void weigh(float *out, int64_t out_pitch, const Scratch<Real> &scratch, int64_t x, int64_t pitch,
                  const Affinity &task)
{
    const int64_t channels = task.channels, count = task.neighbours.count;
    const Real mean = Real(M_LOG2E) / channels, factor = power == 2 ? std::sqrt(mean) : mean; // exponents to the base 2
    Real least[BLOCK];
    for (int64_t k = 0; k < channels; k++) find_scales<power>(scratch, k, x, pitch, factor, task);
    for (int64_t k = 0; k < channels; k += 3) // 3 channels at a time, as many as registers hold
        switch (channels - k) {
        case 1: add_exponents<1, power>(scratch, k, x, pitch, least, count); break;
        case 2: add_exponents<2, power>(scratch, k, x, pitch, least, count); break;
        default: add_exponents<3, power>(scratch, k, x, pitch, least, count);
        }
    softmax(out, out_pitch, scratch, least, task);
}

template <typename Real> static Scratch<Real> take_scratch(Workspace &workspace, const Affinity &task)
{
    const int64_t count = task.neighbours.count;
    Scratch<Real> scratch;
    scratch.rows = workspace.take<const Real *>(count);
    scratch.scales = workspace.take<Real[BLOCK]>(task.channels);
    scratch.nearest = workspace.take<Real[BLOCK]>(task.channels);
    scratch.shifts = workspace.take<Real[BLOCK]>(task.channels);
    scratch.exponents = workspace.take<Real[BLOCK]>(count);
    scratch.weights = workspace.take<float[BLOCK]>(count);
    return scratch;
}

// The layout of the workspace: the images as tables, then the scratch memory of every thread.
template <typename Real> struct AffinityPlan {
    Table table;
    int64_t threads, shared_bytes, scratch_bytes;
    Real *tables;

    AffinityPlan(const Affinity &task, void *memory)
    {
        const int64_t reach = task.neighbours.reach, pixels = task.batch * task.height * task.width;
        threads = limit_threads(task.threads, pixels * task.neighbours.count * task.channels, GRAIN);
        table = make_table<Real>(task.channels, task.height, task.width, reach, reach + BLOCK);
        Workspace workspace = {(uintptr_t)memory};
        tables = workspace.take<Real>(task.batch * task.height * task.channels * table.pitch);
        shared_bytes = workspace.used;
        take_scratch<Real>(workspace, task);
        scratch_bytes = workspace.used - shared_bytes;
    }
    int64_t bytes() const { return shared_bytes + threads * scratch_bytes; }
};

template <int power, typename Real>
static void weigh_row(Scratch<Real> &scratch, const Affinity &task, const AffinityPlan<Real> &plan, int64_t image,
                      int64_t y)
{
    const int64_t count = task.neighbours.count, width = task.width, pixels = std::min<int64_t>(width, BLOCK);
    const Real *map = plan.tables + image * task.height * task.channels * plan.table.pitch;
    find_rows(scratch.rows, map, plan.table, task.neighbours, y);
    scratch.centre = plan.table.row(map, y);
    float *out = task.out + (image * task.height + y) * count * width;
    for (int64_t x = 0; x < width; x += BLOCK) {
        // The last block overlaps the one before, unless it is the only one.
        const int64_t start = std::max<int64_t>(0, std::min<int64_t>(x, width - BLOCK));
        if (pixels == BLOCK) {
            weigh<power>(out + start, width, scratch, start, plan.table.pitch, task);
        } else { // the row is narrower than the block
            weigh<power>(scratch.weights[0], BLOCK, scratch, start, plan.table.pitch, task);
            for (int64_t n = 0; n < count; n++) std::copy_n(scratch.weights[n], pixels, out + n * width);
        }
    }
}

template <typename Real> static void affinity(const Affinity &task, void *memory)
{
    const AffinityPlan<Real> plan(task, memory);
    in_parallel(plan.threads, [&](int64_t thread, int64_t threads) {
        Workspace own = {(uintptr_t)memory, plan.shared_bytes + thread * plan.scratch_bytes};
        auto scratch = take_scratch<Real>(own, task);
        const int64_t rows = task.batch * task.height;
        const int64_t first = rows * thread / threads, last = rows * (thread + 1) / threads;
        for (int64_t row = first; row < last; row++) {
            auto image = (const Real *)task.image + row / task.height * task.strides[0];
            read_row(plan.table.row(plan.tables, row), image, task.strides, row % task.height, plan.table, false);
        }
        wait_for_all(threads);
        const auto weigh = task.variant.power == 2 ? weigh_row<2, Real> : weigh_row<1, Real>;
        for (int64_t row = first; row < last; row++) weigh(scratch, task, plan, row / task.height, row % task.height);
    });
}

extern "C" {
extern const int64_t affinity_size = sizeof(Affinity); // so that interface.py can compare it with its own

int64_t affinity_float_workspace(const Affinity *task) { return AffinityPlan<float>(*task, nullptr).bytes(); }
int64_t affinity_double_workspace(const Affinity *task) { return AffinityPlan<double>(*task, nullptr).bytes(); }
void affinity_float(const Affinity *task, void *workspace) { affinity<float>(*task, workspace); }
void affinity_double(const Affinity *task, void *workspace) { affinity<double>(*task, workspace); }
}
