// Work sharing on the OpenMP runtime that PyTorch has loaded, called by its C symbol: no second runtime, no second
// pool of threads, and nothing to link. Without that symbol the work runs on the calling thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace halflap {

typedef void (*team_function)(void (*)(void*), void*, unsigned, unsigned);
extern team_function start_team;  // GOMP_parallel, or null

// Scratch memory of one thread, aligned for vectors, grown when needed and kept for the next call
float* scratch(int64_t floats);

// Elements from a row of work memory to the next: an odd number of cache lines, or a column of rows would meet in one
// set of the cache. Mirrored by `row_stride` in common.py.
template <class T>
int64_t row_stride(int64_t n) {
    return ((n * (int64_t)sizeof(T) + 63) / 64 | 1) * 64 / (int64_t)sizeof(T);
}

// Scratch of a task, carved from one block; sizes in floats (an element of a matrix product is as wide as one)
struct Carver {
    float *next, *end;
    explicit Carver(int64_t floats) : next(scratch(floats)), end(next + floats) {}
    Carver(float* memory, int64_t floats) : next(memory), end(memory + floats) {}
    template <class E = float>
    E* take(int64_t floats) {
        float* taken = next;
        next += (floats + 15) / 16 * 16;
        if (next > end) abort();  // a block reckoned too small: better no result than a wrong one
        return reinterpret_cast<E*>(taken);
    }
};

// Calls body(task) for 0 <= task < tasks on up to `threads` threads; tasks are handed out one by one
template <class Body>
void parallel_tasks(int64_t tasks, int threads, const Body& body) {
    struct Job {
        const Body* body;
        std::atomic<int64_t> next;
        int64_t tasks;
    } job{&body, {0}, tasks};
    auto run = [](void* data) {
        Job* job = static_cast<Job*>(data);
        for (int64_t task; (task = job->next.fetch_add(1)) < job->tasks;) (*job->body)(task);
    };
    if (threads > tasks) threads = (int)tasks;
    if (threads > 1 && start_team) start_team(run, &job, (unsigned)threads, 0);
    else run(&job);
}

// Calls body(begin, end) for ranges that cover 0..n, none smaller than `grain`, several a thread
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, int threads, const Body& body) {
    int64_t size = (n + 4 * threads - 1) / (4 * threads);
    if (size < grain) size = grain;
    if (size >= n || threads == 1) return body(0, n);
    parallel_tasks((n + size - 1) / size, threads, [&](int64_t task) {
        int64_t begin = task * size;
        body(begin, begin + size < n ? begin + size : n);
    });
}

}  // namespace halflap
