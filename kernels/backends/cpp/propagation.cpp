// The propagation of PAMR and PAR (eq. 7) on a CPU, and its transpose. library.py compiles it, __init__.py calls it.
// The code allocates no memory: the caller passes a workspace with the number of bytes that `*_workspace` returns.
//
// An affinity is [batch][height][neighbours][width].

#include "tables.h"

#include <cstring>
#include <utility>
#ifdef __F16C__
#include <immintrin.h>
#endif

// Number of sums that fit in registers, beside the weights and an operand.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 24;
#else
constexpr int SUMS = 12;
#endif
constexpr int MAX_CHANNELS = 12, MAX_VECTORS = 4; // the largest tile of sums: channels x registers

// Minimum work of a thread, in terms of sums: between two barriers, and in a call without barriers.
constexpr int64_t GRAIN = 1 << 18, GRAIN_APART = 1 << 19;

// Threads work apart, each on units of its own and without barriers, if the largest share of the work is at most
// BALANCE times the mean. The channels of an image may be divided among them if its weights have at most
// SHARED_WEIGHTS_BYTES, into units of about SHARED_WEIGHTS_CHANNELS or more.
constexpr double BALANCE = 1.125;
constexpr int64_t SHARED_WEIGHTS_BYTES = 2 << 20, SHARED_WEIGHTS_CHANNELS = 3;

// As many units are worked on at once as there are threads, as long as their tables and the weights that the transpose
// copies fit these bytes. Each has two tables, of which one is counted.
constexpr int64_t SLOTS_BYTES = 24 << 20;
constexpr int64_t MAX_SLOTS = 64;

enum Type { FLOAT64, FLOAT32, FLOAT16, BFLOAT16 };

struct Propagation {
    const void *masks; // [batch][channels][height][width], with strides in elements
    int64_t strides[4], batch, channels, height, width;
    void *out;             // contiguous
    const int64_t *counts; // of channels in every image, or null for all
    const void *weights;
    int64_t weights_type; // see Type
    Neighbours neighbours;
    int64_t iterations, transposed, threads;
    int64_t group, chunk_bytes; // channels that are summed together; bytes of a chunk, which stays in the cache
};

// ---- Propagation, eq. 7: m^t_i = sum over n of alpha_in m^(t-1)_n ----

// A chunk of an image's channels.
struct Unit {
    int64_t image, channel, channels;

    int64_t cost() const { return channels + 1; } // 1 for the weights
};

// The units of a call, one after the other. An image has at least `split` units if it has enough channels.
struct Units {
    const Propagation &task;
    int64_t split, image = 0, chunk = 0;

    int64_t channels_of(int64_t b) const { return task.counts ? task.counts[b] : task.channels; }
    int64_t chunks_of(int64_t b, int64_t size) const
    {
        const int64_t channels = channels_of(b), bytes = channels * task.height * task.width * size;
        const int64_t parts = std::min(split, divide_up(channels, SHARED_WEIGHTS_CHANNELS));
        return std::min(channels, std::max(parts, divide_up(bytes, task.chunk_bytes)));
    }
    // Take the next units, at most `slots`, and return how many there are.
    int64_t next(Unit *units, int64_t slots, int64_t size)
    {
        int64_t taken = 0;
        while (taken < slots && image < task.batch) {
            const int64_t chunks = chunks_of(image, size), channels = channels_of(image);
            if (chunk < chunks) {
                const int64_t first = channels * chunk / chunks, last = channels * (chunk + 1) / chunks;
                units[taken++] = {image, first, last - first};
                chunk++;
            } else {
                image++;
                chunk = 0;
            }
        }
        return taken;
    }
};

// Call work(unit, thread) for all units. A unit belongs to the thread in whose share of the cost its middle lies.
template <typename Work>
static void share_units(const Units &units, int64_t size, int64_t threads, const Work &work)
{
    Unit unit;
    int64_t total = 0, start = 0;
    for (Units all = units; all.next(&unit, 1, size);) total += unit.cost();
    for (Units all = units; all.next(&unit, 1, size); start += unit.cost())
        work(unit, (2 * start + unit.cost()) * threads / (2 * total));
}

// Return whether all threads have about the same work if each propagates units of its own.
static bool is_balanced(const Units &units, int64_t size, int64_t threads)
{
    int64_t total = 0, largest = 0, share = 0, owner = 0;
    share_units(units, size, threads, [&](const Unit &unit, int64_t thread) {
        share = (thread == owner ? share : 0) + unit.cost();
        owner = thread;
        largest = std::max(largest, share);
        total += unit.cost();
    });
    return largest * threads <= BALANCE * total;
}

// The layout of the workspace: for every slot, two tables that are filled in turn by the iterations and, for the
// transpose, the weights of the slot; then the pointers and copies of weights of every thread.
template <typename Real> struct PropagationPlan {
    Table table; // for the largest number of channels of a unit
    int64_t threads, slots, table_size, sides, weights_pitch, shifted_size, last_row_size, terms, shared_bytes,
        worker_bytes;
    bool halves; // whether weights are read as float16
    bool copied; // whether weights must be copied before they are read
    bool apart;  // whether each thread propagates units of its own
    int64_t split; // the least number of units of an image with enough channels
    Real *tables[2], *shifted, *last_row;
    int64_t *first_readers; // per row, the number of readers of all rows above it

    PropagationPlan(const Propagation &task, void *memory);
    void share_work(const Propagation &task);
    int64_t lay_out(const Propagation &task, int64_t parts);
    int64_t bytes() const { return shared_bytes + threads * worker_bytes; }
};

// Return the first and the last row whose neighbour n is in row y. For the top row, rows whose neighbour is above the
// image are included; for the bottom row, those whose neighbour is below it.
static std::pair<int64_t, int64_t> readers_of(const Propagation &task, int64_t y, int64_t n)
{
    const int64_t bottom = task.height - 1, row = y - task.neighbours.dy[n];
    return {y == 0 ? 0 : std::max<int64_t>(row, 0), y == bottom ? bottom : std::min(row, bottom)};
}

// Return the number of readers of row y: pairs of a row and a neighbour. The top and the bottom row have the most.
static int64_t count_readers(const Propagation &task, int64_t y)
{
    int64_t count = 0;
    for (int64_t n = 0; n < task.neighbours.count; n++) {
        const auto [first, last] = readers_of(task, y, n);
        count += std::max<int64_t>(last - first + 1, 0);
    }
    return count;
}

// Convert float16 to float32. A multiplication corrects the bias of the exponent and normalises subnormal numbers.
static float widen_float16(uint16_t half)
{
    uint32_t bits = uint32_t(half & 0x7fff) << 13, infinite = bits >= 0x0f800000 ? 0x7f800000 : 0;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= infinite | uint32_t(half & 0x8000) << 16;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static float widen_bfloat16(uint16_t half)
{
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Copy a row of weights of any type, from its element `first` on.
template <typename Real>
static void read_weights(Real *out, const void *weights, int64_t type, int64_t first, int64_t size)
{
    auto halves = (const uint16_t *)weights + first;
    switch (type) {
    case FLOAT64: std::copy_n((const double *)weights + first, size, out); break;
    case FLOAT32: std::copy_n((const float *)weights + first, size, out); break;
    case FLOAT16:
        for (int64_t i = 0; i < size; i++) out[i] = widen_float16(halves[i]);
        break;
    case BFLOAT16:
        for (int64_t i = 0; i < size; i++) out[i] = widen_bfloat16(halves[i]);
        break;
    }
}

// Load a register of weights. float16 is converted here if the processor has an instruction for it.
#ifdef __F16C__
constexpr bool LOADS_HALVES = true;
template <typename Real> static Vector<Real> load(const uint16_t *halves)
{
#ifdef __AVX512F__
    return (Vector<Real>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
#else
    return (Vector<Real>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
#endif
}
#else
constexpr bool LOADS_HALVES = false;
template <typename Real> static Vector<Real> load(const uint16_t *) { return Vector<Real>{}; }
#endif

// The terms of the sums: weights[n * stride + x] * rows[n][x] for all n < count, in every channel.
template <typename Real> struct Terms {
    const Real *const *rows;
    const void *weights;
    int64_t stride, count, pitch;
    // Prefetched for the next row of pixels: its weights, which start `next` elements later, and `ahead`, the one row
    // of masks that was not read before.
    int64_t next;
    const Real *ahead;
};

// Sum `vectors` registers of pixels from column x on, in `channels` channels from `channel` on.
template <int channels, int vectors, typename Real, typename Weight>
static void sum(Real *out, const Terms<Real> &terms, int64_t channel, int64_t x)
{
    constexpr int lanes = LANES<Real>;
    constexpr int line = std::max<int>(LINE / (lanes * sizeof(Weight)), 1); // registers in a cache line of weights
    const int64_t pitch = terms.pitch, stride = terms.stride, count = terms.count, next = terms.next;
    const int64_t first = channel * pitch + x;
    const Real *const *rows = terms.rows, *ahead = terms.ahead;
    const Weight *weights = (const Weight *)terms.weights + x;
    Vector<Real> sums[channels][vectors];
    // Without the pragmas, GCC keeps the sums in memory before and after the loop.
#pragma GCC unroll 16
    for (int c = 0; c < channels; c++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) sums[c][v] = Vector<Real>{};
    for (int64_t n = 0; n < count; n++, weights += stride) {
        const Real *row = rows[n] + first;
        Vector<Real> weight[vectors];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) weight[v] = load<Real>(weights + v * lanes);
        // Into the second-level cache: the first is too small for a row of weights.
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v += line) __builtin_prefetch(weights + next + v * lanes, 0, 2);
#pragma GCC unroll 16
        for (int c = 0; c < channels; c++, row += pitch) {
            // Hides from the compiler how `row` moves. Otherwise it keeps an offset per channel, of which most do not
            // fit the registers, and reads them from the stack for every neighbour.
            asm("" : "+r"(row));
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) sums[c][v] += weight[v] * load(row + v * lanes); // eq. 7
        }
    }
#pragma GCC unroll 16
    for (int c = 0; c < channels; c++) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) store(out + first + c * pitch + v * lanes, sums[c][v]);
#pragma GCC unroll 16
        for (int pixel = 0; pixel < vectors * lanes; pixel += LINE / sizeof(Real))
            __builtin_prefetch(ahead + first + c * pitch + pixel);
    }
}

constexpr int most_vectors(int channels) { return std::clamp(SUMS / channels, 1, MAX_VECTORS); }

template <typename Real> using Sum = void (*)(Real *, const Terms<Real> &, int64_t, int64_t);

// Return the function `sum` for these numbers of channels and registers.
template <typename Real, typename Weight, int most_channels = MAX_CHANNELS, int most = most_vectors(most_channels)>
static Sum<Real> find_sum(int64_t channels, int64_t vectors)
{
    if constexpr (most_channels > 1)
        if (channels < most_channels) return find_sum<Real, Weight, most_channels - 1>(channels, vectors);
    if constexpr (most > 1)
        if (vectors < most) return find_sum<Real, Weight, most_channels, most - 1>(channels, vectors);
    return sum<most_channels, most, Real, Weight>;
}

// Sum columns [start, end) of a row of pixels in `channels` channels, `group` at a time.
template <typename Real, typename Weight>
static void sum_row(Real *out, const Terms<Real> &terms, int64_t channels, int64_t group, int64_t start, int64_t end)
{
    constexpr int lanes = LANES<Real>;
    const int64_t groups = divide_up(channels, group);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t channel = channels * g / groups, size = channels * (g + 1) / groups - channel;
        const int64_t vectors = most_vectors(size);
        const Sum<Real> most = find_sum<Real, Weight>(size, vectors);
        for (int64_t x = start; x < end;) {
            // The last registers overlap those before, unless there are fewer columns than a register has lanes.
            const int64_t rest = x > start ? divide_up(end - x, lanes) : (end - x) / lanes;
            const int64_t registers = std::clamp<int64_t>(rest, 1, vectors);
            x = std::max(start, std::min(x, end - registers * lanes));
            (registers == vectors ? most : find_sum<Real, Weight>(size, registers))(out, terms, channel, x);
            x += registers * lanes;
        }
    }
}

// The memory and the work of one thread.
template <typename Real> struct Worker {
    const Propagation &task;
    const PropagationPlan<Real> &plan;
    const Real **rows; // of the terms of a sum, like the members below
    int64_t *columns; // the columns by which the transpose shifts them
    Real *copies;     // of weights

    Worker(const Propagation &task, const PropagationPlan<Real> &plan, Workspace &workspace) : task(task), plan(plan)
    {
        rows = workspace.take<const Real *>(plan.terms);
        columns = workspace.take<int64_t>(plan.terms);
        copies = workspace.take<Real>(plan.copied ? plan.terms * plan.weights_pitch : 0);
    }

    // Return the index at which the weights of row y and neighbour n start.
    int64_t weights_of(int64_t image, int64_t y, int64_t n) const
    {
        return ((image * task.height + y) * task.neighbours.count + n) * task.width;
    }

    void copy_weights(Real *to, int64_t image, int64_t y) const
    {
        for (int64_t n = 0; n < task.neighbours.count; n++, to += plan.weights_pitch)
            read_weights(to, task.weights, task.weights_type, weights_of(image, y, n), task.width);
    }

    // Return whether this is the last row of all weights and narrower than a register. Loads would read beyond the end
    // of the weights, so `last_row` holds a copy.
    bool is_copied_once(int64_t image, int64_t y) const
    {
        return plan.last_row_size && image == task.batch - 1 && y == task.height - 1;
    }

    // Eq. 7 for a row of pixels.
    void propagate_row(Real *to, const Real *from, const Table &table, int64_t image, int64_t y) const
    {
        const int64_t count = task.neighbours.count, width = task.width, first = weights_of(image, y, 0);
        find_rows(rows, from, table, task.neighbours, y);
        const Real *ahead = table.row(from, std::min(y + 1 + task.neighbours.reach, task.height - 1));
        Real *out = table.row(to, y);
        Terms<Real> terms = {rows, (const Real *)task.weights + first, width, count, table.pitch, count * width, ahead};
        if (plan.halves) terms.weights = (const uint16_t *)task.weights + first;
        if (plan.copied) copy_weights(copies, image, y);
        if (plan.copied || is_copied_once(image, y)) {
            terms.weights = plan.copied ? copies : plan.last_row;
            terms.stride = plan.weights_pitch;
            terms.next = 0;
        }
        (plan.halves ? sum_row<Real, uint16_t> : sum_row<Real, Real>)(out, terms, table.channels, task.group, 0, width);
        for (int64_t c = 0; c < table.channels; c++) pad_sides(out + c * table.pitch, table, false);
    }

    // The transpose of eq. 7: a pixel sums its readers, the pixels that it is a neighbour of. Their weights are copied
    // once, in the order in which the sums read them. They are shifted to the columns that they read, and the other
    // columns are 0.
    void shift_weights(Real *shifted, int64_t image, int64_t y) const
    {
        visit_readers(y, [&](int64_t index, int64_t p, int64_t n) {
            Real *row = shifted + (plan.first_readers[y] + index) * plan.weights_pitch;
            Real *start = row + plan.sides + task.neighbours.dx[n];
            std::fill(row, start, Real(0));
            read_weights(start, task.weights, task.weights_type, weights_of(image, p, n), task.width);
            std::fill(start + task.width, row + plan.weights_pitch, Real(0));
        });
    }

    // Columns beyond the image are summed like the others, and then added to the border that they replicate.
    void propagate_transposed_row(Real *to, const Real *from, const Real *shifted, const Table &table, int64_t y) const
    {
        constexpr int lanes = LANES<Real>;
        const int64_t width = task.width, reach = task.neighbours.reach;
        const int64_t count = find_readers(from, table, y), pitch = plan.weights_pitch;
        const Real *weights = shifted + plan.first_readers[y] * pitch + plan.sides;
        const Real *ahead = table.row(from, std::min(y + 1 + reach, task.height - 1));
        Real *out = table.row(to, y);
        auto sum_columns = [&](int64_t first, int64_t last, int64_t start, int64_t end) {
            const int64_t next = task.neighbours.count * pitch;
            const Terms<Real> terms = {rows + first, weights + first * pitch, pitch, last - first, table.pitch, next,
                                       ahead};
            sum_row<Real, Real>(out, terms, table.channels, task.group, start, end);
        };
        sum_columns(0, count, 0, width);
        int64_t first = 0, last = count; // the readers that reach these columns: find_readers sorts by column
        for (int64_t x = -lanes; x > -reach - lanes; x -= lanes) {
            while (last > 0 && columns[last - 1] >= x + lanes) last--;
            sum_columns(0, last, x, x + lanes);
        }
        for (int64_t x = std::max<int64_t>(width, lanes); x < width + reach; x += lanes) {
            while (first < count && columns[first] <= x - width) first++;
            sum_columns(first, count, x, x + lanes);
        }
        for (int64_t c = 0; c < table.channels; c++) {
            Real *row = out + c * table.pitch;
            for (int64_t x = 1; x <= reach; x++) {
                row[0] += row[-x];
                row[width - 1] += row[width - 1 + x];
            }
            pad_sides(row, table, true);
        }
    }

    // Call visit(index, p, n) for all readers of row y: neighbour n of the pixels of row p is in row y. Readers with
    // the leftmost neighbours come first. Return the number of readers.
    template <typename Visit> int64_t visit_readers(int64_t y, const Visit &visit) const
    {
        int64_t index = 0;
        for (int64_t i = 0; i < task.neighbours.count; i++) {
            const int64_t n = task.neighbours.by_dx[i];
            const auto [first, last] = readers_of(task, y, n);
            for (int64_t p = first; p <= last; p++) visit(index++, p, n);
        }
        return index;
    }

    // List the terms of row y of the transpose. Return their number.
    int64_t find_readers(const Real *from, const Table &table, int64_t y) const
    {
        return visit_readers(y, [&](int64_t index, int64_t p, int64_t n) {
            columns[index] = task.neighbours.dx[n];
            rows[index] = table.row(from, p) - columns[index];
        });
    }
};

template <typename Real> PropagationPlan<Real>::PropagationPlan(const Propagation &task, void *memory)
{
    const int64_t count = task.neighbours.count;
    sides = task.transposed ? round_up(task.neighbours.reach, LANES<Real>) : 0;
    weights_pitch = std::max<int64_t>(task.width, LANES<Real>) + 2 * sides;
    shifted_size = task.transposed ? task.height * count * weights_pitch : 0;
    const bool narrow = task.width < LANES<Real>, single = sizeof(Real) == sizeof(float);
    halves = LOADS_HALVES && single && task.weights_type == FLOAT16 && !narrow && !task.transposed;
    // If a row of all neighbours has fewer weights than a register, loads of the row before the last pass the end, too.
    const bool converted = task.weights_type != (single ? FLOAT32 : FLOAT64);
    copied = !task.transposed && !halves && (converted || count * task.width < LANES<Real>);
    terms = task.transposed ? std::max(count_readers(task, 0), count_readers(task, task.height - 1)) : count;
    share_work(task);
    Workspace workspace = {(uintptr_t)memory};
    for (auto &one : tables) one = workspace.take<Real>(slots * table_size);
    shifted = workspace.take<Real>(slots * shifted_size);
    last_row_size = narrow && !copied && !task.transposed ? count * weights_pitch : 0;
    last_row = workspace.take<Real>(last_row_size);
    first_readers = workspace.take<int64_t>(task.transposed ? task.height : 0);
    shared_bytes = workspace.used;
    Worker<Real>(task, *this, workspace);
    worker_bytes = workspace.used - shared_bytes;
}

// Choose the units, the number of threads, and whether these work apart. They do if at least as many threads can work
// apart as would share rows.
template <typename Real> void PropagationPlan<Real>::share_work(const Propagation &task)
{
    const int64_t weights = task.neighbours.count * task.height * task.width, size = sizeof(Real);
    int64_t work = 0, best_parts = 1;
    for (int64_t b = 0; b < task.batch; b++) work += Units{task, 1}.channels_of(b) * weights;
    threads = limit_threads(task.threads, work, GRAIN);
    apart = false;
    const int64_t limit = limit_threads(task.threads, work * task.iterations, GRAIN_APART);
    for (int64_t parts : {int64_t(1), limit}) {
        if (parts > 1 && weights * size > SHARED_WEIGHTS_BYTES) break;
        const int64_t apart_threads = std::min(limit, lay_out(task, parts));
        const bool is_better = apart ? apart_threads > threads : apart_threads >= threads;
        if (is_better && is_balanced(Units{task, parts}, size, apart_threads)) {
            apart = true;
            threads = apart_threads;
            best_parts = parts;
        }
    }
    const int64_t fitting = lay_out(task, best_parts);
    slots = apart ? threads : std::min({fitting, MAX_SLOTS, threads});
}

// Set `split` and the size of the tables. Return how many units can be worked on at once, at least 1.
template <typename Real> int64_t PropagationPlan<Real>::lay_out(const Propagation &task, int64_t parts)
{
    split = parts;
    const Units units{task, split};
    int64_t total = 0, most = 1;
    for (int64_t b = 0; b < task.batch; b++) {
        const int64_t chunks = units.chunks_of(b, sizeof(Real));
        total += chunks;
        if (chunks) most = std::max(most, divide_up(units.channels_of(b), chunks));
    }
    const int64_t reach = task.neighbours.reach;
    table = make_table<Real>(most, task.height, task.width, reach, std::max(reach, sides));
    table_size = most * task.height * table.pitch;
    const int64_t bytes = (table_size + shifted_size) * sizeof(Real);
    return std::max<int64_t>(std::min(total, SLOTS_BYTES / bytes), 1);
}

template <typename Real>
static void write_row(const Propagation &task, const Real *row, const Table &table, const Unit &unit, int64_t y)
{
    const int64_t plane = task.height * task.width;
    Real *out = (Real *)task.out + (unit.image * task.channels + unit.channel) * plane + y * task.width;
    for (int64_t c = 0; c < unit.channels; c++) std::copy_n(row + c * table.pitch, task.width, out + c * plane);
}

// Call work(u, y) for this thread's share of the rows of all units: equal shares of channels x rows.
template <typename Work>
static void share_rows(const Unit *units, int64_t count, int64_t height, int64_t thread, int64_t threads,
                       const Work &work)
{
    int64_t total = 0, start = 0;
    for (int64_t u = 0; u < count; u++) total += units[u].cost() * height;
    const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
    for (int64_t u = 0; u < count; u++) {
        const int64_t cost = units[u].cost();
        auto row_at = [&](int64_t position) {
            return std::min(divide_up(std::max<int64_t>(position - start, 0), cost), height);
        };
        // A row belongs to the thread in whose share it starts.
        for (int64_t y = row_at(begin); y < row_at(end); y++) work(u, y);
        start += cost * height;
    }
}

// Propagate `count` units at once, in the slots from `first_slot` on: this thread's share of their rows.
template <typename Real>
static void propagate_units(const Worker<Real> &worker, const Unit *units, int64_t count, int64_t first_slot,
                            int64_t thread, int64_t threads)
{
    const Propagation &task = worker.task;
    const PropagationPlan<Real> &plan = worker.plan;
    auto each_row = [&](auto work) {
        share_rows(units, count, task.height, thread, threads, [&](int64_t u, int64_t y) {
            Table table = plan.table;
            table.channels = units[u].channels;
            work(units[u], table, first_slot + u, y);
        });
        wait_for_all(threads);
    };
    each_row([&](const Unit &unit, const Table &table, int64_t slot, int64_t y) {
        auto masks = (const Real *)task.masks + unit.image * task.strides[0] + unit.channel * task.strides[1];
        Real *map = plan.tables[0] + slot * plan.table_size;
        read_row(table.row(map, y), masks, task.strides, y, table, task.transposed);
        if (task.transposed) worker.shift_weights(plan.shifted + slot * plan.shifted_size, unit.image, y);
    });
    for (int64_t t = 0; t < task.iterations; t++)
        each_row([&](const Unit &unit, const Table &table, int64_t slot, int64_t y) {
            const Real *from = plan.tables[t % 2] + slot * plan.table_size;
            Real *to = plan.tables[(t + 1) % 2] + slot * plan.table_size;
            if (task.transposed)
                worker.propagate_transposed_row(to, from, plan.shifted + slot * plan.shifted_size, table, y);
            else
                worker.propagate_row(to, from, table, unit.image, y);
            if (t == task.iterations - 1) write_row(task, table.row(to, y), table, unit, y);
        });
}

// Propagate this thread's own units.
template <typename Real>
static void propagate_apart(const Worker<Real> &worker, int64_t thread, int64_t threads)
{
    share_units(Units{worker.task, worker.plan.split}, sizeof(Real), threads, [&](const Unit &unit, int64_t owner) {
        if (owner == thread) propagate_units(worker, &unit, 1, thread, 0, 1);
    });
}

// Propagate all units, as many at once as there are slots. Every thread computes its share of their rows.
template <typename Real>
static void propagate_together(const Worker<Real> &worker, int64_t thread, int64_t threads)
{
    Units units{worker.task, worker.plan.split};
    Unit round[MAX_SLOTS];
    while (const int64_t count = units.next(round, worker.plan.slots, sizeof(Real)))
        propagate_units(worker, round, count, 0, thread, threads);
}

template <typename Real> static void propagate(const Propagation &task, void *memory)
{
    const PropagationPlan<Real> plan(task, memory);
    for (int64_t y = 0, first = 0; task.transposed && y < task.height; first += count_readers(task, y++))
        plan.first_readers[y] = first;
    auto make_worker = [&](int64_t thread) {
        Workspace own = {(uintptr_t)memory, plan.shared_bytes + thread * plan.worker_bytes};
        return Worker<Real>(task, plan, own);
    };
    if (plan.last_row_size) make_worker(0).copy_weights(plan.last_row, task.batch - 1, task.height - 1);
    in_parallel(plan.threads, [&](int64_t thread, int64_t threads) {
        (plan.apart ? propagate_apart<Real> : propagate_together<Real>)(make_worker(thread), thread, threads);
    });
}

extern "C" {
extern const int64_t propagation_size = sizeof(Propagation); // so that interface.py can compare it with its own

int64_t propagate_float_workspace(const Propagation *task) { return PropagationPlan<float>(*task, nullptr).bytes(); }
int64_t propagate_double_workspace(const Propagation *task) { return PropagationPlan<double>(*task, nullptr).bytes(); }
void propagate_float(const Propagation *task, void *workspace) { propagate<float>(*task, workspace); }
void propagate_double(const Propagation *task, void *workspace) { propagate<double>(*task, workspace); }
}
