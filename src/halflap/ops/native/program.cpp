// One token of many sequences through a whole model in one call: a list of instructions, walked by every thread.
//
// Between two instructions there is no parallel region to open and no tensor to make, only the wait until what the next
// one reads is there. An instruction is a number of tasks; threads take them one by one, and a thread that finds none
// left waits until those taken are done. So any number of threads may take part, however late they come. Values between
// instructions are float32 in one workspace; states and weights are in their own types.
//
// A new kind of instruction: its struct, `tasks` and `work` here, its line in KINDS, and its class in program.py.
#include "attention_step.h"
#include "few_rows.h"
#include "mamba2_step.h"
#include "packed_rows.h"
#include "selective_step.h"
#include <algorithm>
#include <atomic>
#include <numeric>
#include <sched.h>
#include <vector>

using namespace halflap;

namespace {

// What one cache keeps of a block: convolution tail and SSM state, or keys and values. Mirrored by program.py.
struct State {
    void *first, *second;
    int64_t first_batch, first_head, second_batch, second_head, narrow;  // strides in elements; narrow: first in bfloat16
};

struct Row {
    int64_t position, cache, index;  // of the new token, meta tokens counted; whose sequence it continues: row `index` of a cache
};

struct Asked {  // mirrored by program.py
    int64_t batch, threads, states_each;
    float *workspace, *output;
    const Row* rows;      // (B)
    const State* states;  // (caches, states_each)
};

struct Run : Asked {
    float* attended;                // what each task of an attention has found
    std::atomic<int64_t>* arrived;  // of each key head and row, how many of those are there

    const State& state(int64_t row, int64_t which) const { return states[rows[row].cache * states_each + which]; }
};

// Columns of a buffer: row b of it begins at offset * batch + b * stride + column of the workspace, or of the output where
// offset is -1
struct Place {
    int64_t offset, stride, column;
    float* of(const Run& run, int64_t row) const {
        return (offset < 0 ? run.output : run.workspace + offset * run.batch) + row * stride + column;
    }
};

struct Instruction {  // mirrored by program.py, as are its kinds
    int64_t kind, waits;  // waits: for all instructions before it
};

enum Normalisation { NONE, RMS, LAYER };

struct Norm {
    int64_t kind;
    const float *gain, *shift;
    double eps;

    void apply(const float* x, int64_t size, float* to) const {
        if (kind == NONE) return (void)memmove(to, x, size * sizeof(float));
        vf sums = splat(0), squares = splat(0);
        if (kind == LAYER)
            for (int64_t i = 0; i < size; i += VL) sums += load_to(x + i, size - i);
        const float mean = sum(sums) / size;
        for (int64_t i = 0; i < size; i += VL) {
            const vf d = load_to(x + i, size - i) - mean;
            squares += i + VL <= size ? d * d : d * d * select(iota() < (int32_t)(size - i), splat(1), splat(0));
        }
        const float scale = (float)(1 / std::sqrt(sum(squares) / size + eps));
        for (int64_t i = 0; i < size; i += VL) {
            vf y = (load_to(x + i, size - i) - mean) * scale * load_to(gain + i, size - i);
            if (shift) y += load_to(shift + i, size - i);
            store_to(to + i, y, size - i);
        }
    }
};

// --- linear maps -------------------------------------------------------------------------------------------------------

enum Activation { LINEAR, SQUARED_RELU, SILU };

// to (+)= activation(weight norm(from) + bias); with `gated` weight norm(from) * activation(beside)
struct Product : Instruction {
    Place from, to, beside;
    Norm norm;
    int64_t inputs, outputs, format, group, narrow_scales, activation, gated, adds;  // format: bits of a weight, or E4M3
    const void *weight, *scales;
    const float* bias;
};

LANES vf activate(int64_t activation, vf x) {
    if (activation == SILU) return silu<float>(x);
    if (activation != SQUARED_RELU) return x;
    const vf positive = maximum(x, splat(0));
    return positive * positive;
}

// What one thread has prepared of a product's input; good until values that it depends on may change
struct Prepared {
    int64_t waits = -1, column = 0, offset = 0, format = 0;
    const float* gain = nullptr;
    bool holds(const Product& p, int64_t now) const {
        return waits == now && column == p.from.column && offset == p.from.offset && format == p.format && gain == p.norm.gain;
    }
};

int64_t product_grain(const Product& p, const Run& run) {
    const int64_t bytes = 1 + p.inputs * p.format / 8, share = p.outputs / (4 * run.threads);
    const int64_t enough = 32768 / bytes;  // below this, handing out a task costs more than it saves
    return round_up((share > enough ? share : enough) + 1, 16);
}

int64_t tasks(const Product& p, const Run& run) {
    const int64_t grain = product_grain(p, run);
    return (p.outputs + grain - 1) / grain;
}

template <class Rows, class Range>
void product(const Product& p, const Run& run, Prepared& prepared, int64_t now, const Range& range) {
    const int64_t M = run.batch, K = p.inputs, floats = round_up(Rows::floats(M, K), 16);
    float* memory = scratch(floats + M * K);  // of equal size, and so undisturbed, for products of the same input
    const bool fresh = !prepared.holds(p, now);
    if (fresh) prepared = {now, p.from.column, p.from.offset, p.format, p.norm.gain};
    const float* x = p.from.of(run, 0);
    int64_t stride = p.from.stride;
    if (fresh && p.norm.kind != NONE) {
        float* normed = memory + floats;
        for (int64_t m = 0; m < M; m++) p.norm.apply(p.from.of(run, m), K, normed + m * K);
        x = normed, stride = K;
    }
    const Rows rows = fresh ? Rows(M, K, x, stride, memory) : Rows(M, K, memory);
    range(rows);
}

void work(const Product& p, const Run& run, int64_t task, Prepared& prepared, int64_t now) {
    const int64_t grain = product_grain(p, run), begin = task * grain, end = begin + grain < p.outputs ? begin + grain : p.outputs;
    auto put = [&](int64_t m, int64_t n, const float* values, int64_t count) {
        float* y = p.to.of(run, m) + n;
        const float* beside = p.gated ? p.beside.of(run, m) + n : nullptr;
        for (int64_t i = 0; i < count; i += VL) {
            const int64_t left = count - i;
            vf v = load_to(values + i, left);
            if (p.bias) v += load_to(p.bias + n + i, left);
            v = beside ? v * activate(p.activation, load_to(beside + i, left)) : activate(p.activation, v);
            if (p.adds) v += load_to(y + i, left);
            store_to(y + i, v, left);
        }
    };
    auto floats = [&](auto* weight) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
        product<FewRows<W>>(p, run, prepared, now, [&](const auto& rows) { rows.range(weight + begin * p.inputs, begin, end, put); });
    };
    const Weights packed{p.outputs, p.inputs, p.group, p.narrow_scales, (const uint32_t*)p.weight, p.scales};
    auto whole = [&](auto bits) {
        using Rows = PackedRows<decltype(bits)::value>;
        static thread_local std::vector<float> scales;
        if ((int64_t)scales.size() < Rows::scale_floats(packed)) scales.resize(Rows::scale_floats(packed));
        product<Rows>(p, run, prepared, now, [&](const auto& rows) { rows.range(packed, begin, end, scales.data(), put); });
    };
    switch (p.format) {
        case 4: return whole(std::integral_constant<int, 4>());
        case 8: return whole(std::integral_constant<int, 8>());
        case E4M3: return whole(std::integral_constant<int, E4M3>());
        case 16: return floats((const bf16*)p.weight);
        default: return floats((const float*)p.weight);
    }
}

// --- recurrences and attention -----------------------------------------------------------------------------------------

struct Mamba2 : Instruction {
    Place from, to;
    int64_t state;
    Mamba2Step step;
};

int64_t tasks(const Mamba2& m, const Run& run) { return run.batch * m.step.groups; }

void work(const Mamba2& m, const Run& run, int64_t task) {
    const int64_t b = task / m.step.groups, g = task % m.step.groups;
    const State& s = run.state(b, m.state);
    const int64_t index = run.rows[b].index;
    float* ssm = (float*)s.second + index * s.second_batch;
    auto step = [&](auto* conv) { mamba2_group_step(m.step, g, m.from.of(run, b), conv + index * s.first_batch, ssm, m.to.of(run, b)); };
    if (s.narrow) step((bf16*)s.first);
    else step((float*)s.first);
}

struct Attention : Instruction {
    Place query, key, value, to;
    int64_t state, own;  // own: this token's keys and values are to be written there
    AttentionStep step;
};

constexpr int64_t SHORTEST_PART = 256;  // positions for which it is worth going over the sums once more

// A key head's positions are divided where there are too few heads for all threads to have the same work.
int64_t parts(const Attention& a, const Run& run) {
    const int64_t heads = run.batch * a.step.key_heads;
    if (heads >= 4 * run.threads) return 1;
    int64_t longest = 0;
    for (int64_t b = 0; b < run.batch; b++) longest = std::max(longest, a.step.kept(run.rows[b].position));
    return std::max<int64_t>(1, std::min(run.threads / std::gcd(heads, run.threads), longest / SHORTEST_PART));
}

int64_t tasks(const Attention& a, const Run& run) { return run.batch * a.step.key_heads * parts(a, run); }

void work(const Attention& a, const Run& run, int64_t task) {
    const AttentionStep& s = a.step;
    const int64_t all = parts(a, run), part = task % all, head = task / all, b = head / s.key_heads, h = head % s.key_heads;
    const State& state = run.state(b, a.state);
    const int64_t index = run.rows[b].index, position = run.rows[b].position, kept = s.kept(position);
    const float *key = a.own ? a.key.of(run, b) + h * s.size : nullptr, *value = a.own ? a.value.of(run, b) + h * s.value_size : nullptr;
    auto of_part = [&](int64_t which) { return Attended(s, run.attended + (head * all + which) * Attended::floats(s)); };
    auto attend = [&](auto* keys, auto* values) {
        attend_step(s, position, kept * part / all, kept * (part + 1) / all, a.query.of(run, b) + h * s.shared() * s.size, key, value,
                    keys + index * state.first_batch + h * state.first_head, values + index * state.second_batch + h * state.second_head, of_part(part));
    };
    if (state.narrow) attend((bf16*)state.first, (bf16*)state.second);
    else attend((float*)state.first, (float*)state.second);
    if (run.arrived[head].fetch_add(1, std::memory_order_acq_rel) + 1 < all) return;
    run.arrived[head].store(0, std::memory_order_relaxed);  // for the next instruction
    Attended whole = of_part(0);
    for (int64_t other = 1; other < all; other++) whole.add(of_part(other));
    whole.put(s, a.to.of(run, b) + h * s.shared() * s.value_size);
}

// A depthwise convolution and SiLU of Mamba-1
struct Convolution : Instruction {
    Place from, to;
    int64_t state, channels, width;
    const float *weight, *bias;  // weight (W, C)
};
constexpr int64_t CHANNELS = 512;  // of a task

int64_t tasks(const Convolution& c, const Run& run) { return run.batch * ((c.channels + CHANNELS - 1) / CHANNELS); }

void work(const Convolution& c, const Run& run, int64_t task) {
    const int64_t slices = (c.channels + CHANNELS - 1) / CHANNELS, b = task / slices, c0 = task % slices * CHANNELS;
    const int64_t count = c.channels - c0 < CHANNELS ? c.channels - c0 : CHANNELS;
    const State& s = run.state(b, c.state);
    auto step = [&](auto* state) {
        convolve_step(c.weight, c.bias, c.width, c.from.of(run, b), state + run.rows[b].index * s.first_batch, c.channels, c0, count, c.to.of(run, b) + c0);
    };
    if (s.narrow) step((bf16*)s.first);
    else step((float*)s.first);
}

// Mamba-1's step of the state, with time step, skip and gate
struct Selective : Instruction {
    Place u, dt, B, C, gate, to;
    int64_t state, channels, states;
    const float *A, *D, *dt_bias;
};

int64_t tasks(const Selective& s, const Run& run) { return run.batch * selective::step_pieces(s.channels); }

void work(const Selective& s, const Run& run, int64_t task) {
    const int64_t pieces = selective::step_pieces(s.channels), b = task / pieces;
    auto rows = [&](const Place& p) { return selective::Rows{p.of(run, b), 0, 0, 0}; };
    const State& state = run.state(b, s.state);
    const selective::Step step{1, s.channels, s.states, 1, rows(s.u), rows(s.dt), rows(s.B), rows(s.C), rows(s.gate), rows(s.to),
                               s.A, s.D, s.dt_bias, (float*)state.second + run.rows[b].index * state.second_batch};
    selective::step_piece(step, 0, task % pieces);
}

// --- norms by themselves -----------------------------------------------------------------------------------------------

// to = norm(from), or with `beside` the mean of norm(from) and other(beside)
struct Normalise : Instruction {
    Place from, beside, to;
    int64_t size, averages;
    Norm norm, other;
};

int64_t tasks(const Normalise&, const Run& run) { return run.batch; }

void work(const Normalise& n, const Run& run, int64_t b) {
    if (!n.averages) return n.norm.apply(n.from.of(run, b), n.size, n.to.of(run, b));
    float *first = scratch(2 * round_up(n.size, VL)), *second = first + round_up(n.size, VL), *to = n.to.of(run, b);
    const float* beside = n.beside.of(run, b);
    n.norm.apply(n.from.of(run, b), n.size, first);
    if (n.other.kind != NONE) n.other.apply(beside, n.size, second), beside = second;
    for (int64_t i = 0; i < n.size; i++) to[i] = (first[i] + beside[i]) * 0.5f;
}

// --- the walk ----------------------------------------------------------------------------------------------------------

enum Kind { PRODUCT, MAMBA2, ATTENTION, CONVOLUTION, SELECTIVE, NORMALISE };

template <class Do>
auto as_kind(const Instruction& i, const Do& act) {
    switch (i.kind) {
        case MAMBA2: return act((const Mamba2&)i);
        case ATTENTION: return act((const Attention&)i);
        case CONVOLUTION: return act((const Convolution&)i);
        case SELECTIVE: return act((const Selective&)i);
        case NORMALISE: return act((const Normalise&)i);
        default: return act((const Product&)i);
    }
}

struct alignas(64) Counter {
    std::atomic<int64_t> taken{0}, done{0};
    int64_t tasks = 0;
};

void wait_for(const Counter& counter) {
    for (int spins = 0; counter.done.load(std::memory_order_acquire) < counter.tasks; spins++) {
        if (spins < 4096) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else sched_yield();  // another thread's processor may be lent to someone else
    }
}

struct Walk {
    const Instruction* const* instructions;
    int64_t count;
    const Run& run;
    Counter* counters;

    void operator()() const {
        Prepared prepared;
        int64_t waited = 0;  // instructions that are known to be done
        for (int64_t i = 0; i < count; i++) {
            const Instruction& instruction = *instructions[i];
            if (instruction.waits)
                for (; waited < i; waited++) wait_for(counters[waited]);
            Counter& counter = counters[i];
            for (int64_t task; (task = counter.taken.fetch_add(1, std::memory_order_relaxed)) < counter.tasks;) {
                as_kind(instruction, [&](const auto& own) {
                    if constexpr (std::is_same_v<std::decay_t<decltype(own)>, Product>) work(own, run, task, prepared, waited);
                    else work(own, run, task), prepared = Prepared();
                });
                counter.done.fetch_add(1, std::memory_order_release);
            }
        }
        for (; waited < count; waited++) wait_for(counters[waited]);
    }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void halflap_run_program(const Instruction* const* instructions, int64_t count, const Asked* asked) {
    static thread_local std::vector<Counter> counters;
    static thread_local std::vector<float> attended;
    static thread_local std::vector<std::atomic<int64_t>> arrived;  // all zero between two runs
    Run run{*asked, nullptr, nullptr};
    if ((int64_t)counters.size() < count) counters = std::vector<Counter>(count);
    for (int64_t i = 0; i < count; i++) {
        counters[i].taken.store(0, std::memory_order_relaxed), counters[i].done.store(0, std::memory_order_relaxed);
        counters[i].tasks = as_kind(*instructions[i], [&](const auto& own) { return tasks(own, run); });
        if (instructions[i]->kind == ATTENTION) {
            const AttentionStep& step = ((const Attention*)instructions[i])->step;
            attended.resize(std::max<size_t>(attended.size(), counters[i].tasks * Attended::floats(step)));
            if ((int64_t)arrived.size() < run.batch * step.key_heads) arrived = std::vector<std::atomic<int64_t>>(run.batch * step.key_heads);
        }
    }
    run.attended = attended.data(), run.arrived = arrived.data();
    Walk walk{instructions, count, run, counters.data()};
    auto enter = [](void* data) { (*static_cast<Walk*>(data))(); };
    if (run.threads > 1 && start_team) start_team(enter, &walk, (unsigned)run.threads, 0);
    else walk();
}

}
