// Bilinear resizing without aligned corners, and the labels of the highest maps, for pseudo labels on a CPU. library.py
// compiles it, labels.py calls it. The code allocates no memory: the caller passes a workspace with the number of bytes
// that `*_workspace` returns.

#include "tables.h"

// The arguments of `resize`.
struct Resize {
    const float *in; // [planes][in_height][in_width], with strides in elements
    int64_t strides[3], planes, in_height, in_width;
    float *out; // [planes][height][width]
    int64_t height, width, threads;
};

// The arguments of `choose_labels`, which labels every pixel with the highest channel of the resized maps.
struct Labels {
    const float *maps; // [batch][channels][views][scores][in_height][in_width]
    int64_t *out;      // [batch][views][height][width]
    const int64_t *counts, *numbers; // [batch], classes per image; [batch][channels - 1], their labels
    int64_t batch, channels, views, scores, in_height, in_width, height, width, ignore_index, threads;
};

// Minimum work per thread, in pixels.
constexpr int64_t GRAIN = 1 << 16;

// The two input samples beside an output sample, and the weight of the second.
struct Between {
    int64_t first, second;
    float weight;
};

// The same for all output samples along an axis.
struct Axis {
    int32_t *first, *second;
    float *weight;

    Axis(Workspace &workspace, int64_t size)
        : first(workspace.take<int32_t>(size)), second(workspace.take<int32_t>(size)),
          weight(workspace.take<float>(size))
    {
    }
    void fill(int64_t in_size, int64_t size) const
    {
        const float scale = float(in_size) / float(size);
        for (int64_t i = 0; i < size; i++) {
            const float position = std::max(scale * (float(i) + 0.5f) - 0.5f, 0.f);
            first[i] = std::min<int64_t>(position, in_size - 1);
            second[i] = std::min<int64_t>(first[i] + 1, in_size - 1);
            weight[i] = std::min(position - float(first[i]), 1.f);
        }
    }
    Between at(int64_t i) const { return {first[i], second[i], weight[i]}; }
};

// If the weight is 0, `b` has no effect even if it is not finite.
static float mix(float a, float b, float weight) { return weight == 0 ? a : (1 - weight) * a + weight * b; }

// Rows of one plane, resized to the width of the result. Two are kept, because successive rows share them.
struct Rows {
    float *rows[2];
    int64_t held[2];

    Rows(Workspace &workspace, int64_t width) : rows{workspace.take<float>(width), workspace.take<float>(width)}
    {
        forget();
    }
    void forget() { held[0] = held[1] = -1; }

    // Return row y of a plane, resized. The row `kept` is not replaced.
    const float *find(const float *plane, const int64_t *strides, int64_t y, int64_t kept, int64_t width,
                      const Axis &columns)
    {
        for (int i = 0; i < 2; i++)
            if (held[i] == y) return rows[i];
        const int i = held[0] == kept ? 1 : 0;
        const float *in = plane + y * strides[0];
        float *out = rows[i];
        held[i] = y;
        auto sample = [&](int64_t x) { return in[x * strides[1]]; };
        for (int64_t x = 0; x < width; x++)
            out[x] = mix(sample(columns.first[x]), sample(columns.second[x]), columns.weight[x]);
        return out;
    }
};

// ---- Resizing ----

struct ResizePlan {
    Workspace workspace;
    Axis columns, lines;
    int64_t threads, shared_bytes, rows_bytes;

    ResizePlan(const Resize &task, void *memory)
        : workspace{(uintptr_t)memory}, columns(workspace, task.width), lines(workspace, task.height)
    {
        threads = limit_threads(task.threads, task.planes * task.height * task.width, GRAIN);
        shared_bytes = workspace.used;
        Rows(workspace, task.width);
        rows_bytes = workspace.used - shared_bytes;
    }
};

static void resize_maps(const Resize &task, void *memory)
{
    const ResizePlan plan(task, memory);
    plan.columns.fill(task.in_width, task.width);
    plan.lines.fill(task.in_height, task.height);
    in_parallel(plan.threads, [&](int64_t thread, int64_t threads) {
        Workspace own = {(uintptr_t)memory, plan.shared_bytes + thread * plan.rows_bytes};
        Rows rows(own, task.width);
        const int64_t total = task.planes * task.height;
        int64_t plane = -1;
        for (int64_t i = total * thread / threads; i < total * (thread + 1) / threads; i++) {
            const int64_t y = i % task.height;
            if (i / task.height != plane) rows.forget();
            plane = i / task.height;
            const float *in = task.in + plane * task.strides[0];
            const Between between = plan.lines.at(y);
            auto find = [&](int64_t row, int64_t kept) {
                return rows.find(in, task.strides + 1, row, kept, task.width, plan.columns);
            };
            const float *a = find(between.first, between.second), *b = find(between.second, between.first);
            float *out = task.out + i * task.width;
            for (int64_t x = 0; x < task.width; x++) out[x] = mix(a[x], b[x], between.weight);
        }
    });
}

// ---- Labels ----

// The memory of a thread: the rows of every channel of a view, the highest scores of a row so far, and their labels.
struct LabelsScratch {
    Rows *rows;
    float *best;
    int32_t *labels[2]; // for the high and the low background score

    LabelsScratch(Workspace &workspace, const Labels &task)
    {
        rows = workspace.take<Rows>(task.channels * task.scores);
        best = workspace.take<float>(task.width);
        for (auto &row : labels) row = workspace.take<int32_t>(task.width);
        for (int64_t i = 0; i < task.channels * task.scores; i++) {
            const Rows own(workspace, task.width);
            if (workspace.base) rows[i] = own;
        }
    }
};

struct LabelsPlan {
    Workspace workspace;
    Axis columns, lines;
    int64_t threads, shared_bytes, scratch_bytes;

    LabelsPlan(const Labels &task, void *memory)
        : workspace{(uintptr_t)memory}, columns(workspace, task.width), lines(workspace, task.height)
    {
        threads = limit_threads(task.threads, task.batch * task.views * task.height * task.width, GRAIN);
        shared_bytes = workspace.used;
        Workspace measured = {0, shared_bytes};
        LabelsScratch(measured, task);
        scratch_bytes = measured.used - shared_bytes;
    }
};

// Fill a row of labels for one background score. Where channels are equal, the first one wins.
static void choose_row(int32_t *labels, float *best, Rows *rows, const float *maps, int64_t view, int64_t score,
                       int64_t image, int64_t y, const LabelsPlan &plan, const Labels &task)
{
    const int64_t size = task.in_height * task.in_width, strides[2] = {task.in_width, 1}, width = task.width;
    const Between between = plan.lines.at(y);
    for (int64_t k = 0; k <= task.counts[image]; k++) {
        const float *plane = maps + ((k * task.views + view) * task.scores + score) * size;
        Rows &own = rows[k * task.scores + score];
        auto find = [&](int64_t row, int64_t kept) {
            return own.find(plane, strides, row, kept, width, plan.columns);
        };
        const float *a = find(between.first, between.second), *b = find(between.second, between.first);
        const float weight = between.weight;
        if (k == 0) {
            for (int64_t x = 0; x < width; x++) {
                best[x] = mix(a[x], b[x], weight);
                labels[x] = 0;
            }
            continue;
        }
        const int32_t number = task.numbers[image * (task.channels - 1) + k - 1];
        for (int64_t x = 0; x < width; x++) {
            const float value = mix(a[x], b[x], weight);
            labels[x] = value > best[x] ? number : labels[x];
            best[x] = value <= best[x] || best[x] != best[x] ? best[x] : value; // NaN stays, and nothing exceeds it
        }
    }
}

static void label_maps(const Labels &task, void *memory)
{
    const LabelsPlan plan(task, memory);
    plan.columns.fill(task.in_width, task.width);
    plan.lines.fill(task.in_height, task.height);
    in_parallel(plan.threads, [&](int64_t thread, int64_t threads) {
        Workspace own = {(uintptr_t)memory, plan.shared_bytes + thread * plan.scratch_bytes};
        LabelsScratch scratch(own, task);
        const int64_t total = task.batch * task.views * task.height;
        int64_t before = -1;
        for (int64_t i = total * thread / threads; i < total * (thread + 1) / threads; i++) {
            const int64_t y = i % task.height, view = i / task.height % task.views;
            const int64_t image = i / task.height / task.views;
            if (i / task.height != before)
                for (int64_t k = 0; k < task.channels * task.scores; k++) scratch.rows[k].forget();
            before = i / task.height;
            const float *maps =
                task.maps + image * task.channels * task.views * task.scores * task.in_height * task.in_width;
            for (int64_t s = 0; s < task.scores; s++)
                choose_row(scratch.labels[s], scratch.best, scratch.rows, maps, view, s, image, y, plan, task);
            const int32_t *high = scratch.labels[0], *low = scratch.labels[task.scores - 1];
            int64_t *out = task.out + i * task.width;
            for (int64_t x = 0; x < task.width; x++) out[x] = high[x] == 0 && low[x] != 0 ? task.ignore_index : high[x];
        }
    });
}

extern "C" {
// The sizes of the structs, so that interface.py can compare them with its own.
extern const int64_t resize_size = sizeof(Resize), labels_size = sizeof(Labels);

int64_t resize_workspace(const Resize *task)
{
    const ResizePlan plan(*task, nullptr);
    return plan.shared_bytes + plan.threads * plan.rows_bytes;
}
int64_t choose_labels_workspace(const Labels *task)
{
    const LabelsPlan plan(*task, nullptr);
    return plan.shared_bytes + plan.threads * plan.scratch_bytes;
}
void resize(const Resize *task, void *workspace) { resize_maps(*task, workspace); }
void choose_labels(const Labels *task, void *workspace) { label_maps(*task, workspace); }
}
