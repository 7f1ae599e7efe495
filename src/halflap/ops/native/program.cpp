// The next tokens of many sequences through a whole model in one call: a list of instructions, walked by every thread.
//
// Between two instructions there is no parallel region to open and no tensor to make, only the wait until what the next
// one reads is there. An instruction is a number of tasks; threads take them one by one, and a thread that finds none
// left waits until those taken are done. So any number of threads may take part, however late they come. Values between
// instructions are float32 in one workspace; states and weights are in their own types.
//
// Linear maps and attention take all tokens at once, recurrences those of a sequence one after the other; what a token
// comes to depends neither on the others of a pass nor on the threads, bit for bit. A pass that holds leaves recurrent
// states as they are and puts aside what they read, and what new keys and values displaced from windows;
// halflap_settle_program then moves every state by the tokens that count.
//
// A new kind of instruction: its struct, `tasks` and `work` (of a state that a pass may hold, `settle_tasks` and `settle`
// too) in program_*.h, its line in `Kind` and `as_kind`, and its class in program.py.
#include "program_attention.h"
#include "program_products.h"
#include "program_states.h"
#include <algorithm>
#include <sched.h>
#include <vector>

namespace halflap {
namespace program {
namespace {

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

enum Kind { PRODUCT, MAMBA2, ATTENTION, CONVOLUTION, SELECTIVE, NORMALISE, KEEP };

template <class Do>
auto as_kind(const Instruction& i, const Do& act) {
    switch (i.kind) {
        case MAMBA2: return act((const Mamba2&)i);
        case ATTENTION: return act((const Attention&)i);
        case CONVOLUTION: return act((const Convolution&)i);
        case SELECTIVE: return act((const Selective&)i);
        case NORMALISE: return act((const Normalise&)i);
        case KEEP: return act((const Keep&)i);
        default: return act((const Product&)i);
    }
}

int64_t settle_tasks(const Instruction&, const Run&) { return 0; }
void settle(const Instruction&, const Run&, int64_t, const int64_t*) {}

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
}  // namespace program
}  // namespace halflap

using namespace halflap;
using namespace halflap::program;

#pragma GCC visibility push(default)
extern "C" {

void halflap_run_program(const Instruction* const* instructions, int64_t count, const Asked* asked) {
    static thread_local std::vector<Counter> counters;
    static thread_local std::vector<float> attended;
    static thread_local std::vector<std::atomic<int64_t>> arrived;  // all zero between two runs
    static thread_local std::vector<int64_t> sequence;
    sequence.resize(asked->batch);
    for (int64_t b = 0; b < asked->sequences; b++)
        std::fill_n(sequence.begin() + asked->rows[b].first, asked->rows[b].count, b);
    Run run{*asked, sequence.data(), nullptr, nullptr};
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

// After a pass that held: the sequences of `asked`, some or all of the pass's, go on by counts[b] tokens each.
void halflap_settle_program(const Instruction* const* instructions, int64_t count, const Asked* asked, const int64_t* counts) {
    struct Task {
        const Instruction* instruction;
        int64_t task;
    };
    static thread_local std::vector<Task> all;
    const Run run{*asked, nullptr, nullptr, nullptr};
    all.clear();
    for (int64_t i = 0; i < count; i++) {
        const int64_t own = as_kind(*instructions[i], [&](const auto& it) { return settle_tasks(it, run); });
        for (int64_t task = 0; task < own; task++) all.push_back({instructions[i], task});
    }
    const Task* list = all.data();
    parallel_tasks((int64_t)all.size(), (int)run.threads, [&](int64_t which) {
        as_kind(*list[which].instruction, [&](const auto& it) { settle(it, run, list[which].task, counts); });
    });
}

}
