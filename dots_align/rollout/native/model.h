// What crosses the boundary from Python (library.py mirrors these structs), and the team of threads that computes.
#pragma once

#include "vec.h"

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <vector>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE()
#endif

struct LayerWeights {  // all [out, in], row after row; null where the layer has none
    const void *input_norm, *q, *k, *v, *o, *q_norm, *k_norm, *mlp_norm;
    const void *gate, *up, *down;  // the dense MLP, or the shared experts
    const void *router, *experts_gate_up, *experts_down;
    const void* correction_bias;
    int64_t inner;  // width of the dense MLP or of the shared experts
};

struct ModelShape {
    const void *embedding, *final_norm, *head;
    const LayerWeights* layer;
    int32_t layers, hidden, heads, kv_heads, head_dim, vocab, experts, top_k, expert_inner;
    int32_t bf16, router_bf16, normalise_gates;
    float eps, gate_scale, score_scale;
};

struct PlanArrays {
    const int32_t *ids, *position, *starts, *cached, *tables, *prefix_starts, *prefix_tables, *prefix_lengths, *logits_at;
    const int32_t *trunk_starts, *trunk_lengths;
    const float *cosines, *sines;  // [positions, head_dim / 2]
    void* const* keys;             // [layers] -> [blocks, block_size, kv_heads, head_dim]
    void* const* values;
    float* out_logits;    // [logits, vocab]
    uint8_t* out_routes;  // [tokens, moe layers, top_k] or null
    int32_t tokens, chains, table_width, prefixes, prefix_table_width, logits, block_size, trunks;
};

enum Phase { EMBED, QKV, ATTENTION, OUTPUT, ROUTER, EXPERTS, COMBINE, MLP, HEAD, SAMPLING, WAITING, PHASES };

// Memory that only grows, aligned to a cache line.
class Buffer {
    std::unique_ptr<char[]> memory;
    size_t size = 0;

  public:
    template <class T>
    T* get(size_t count) {
        const size_t bytes = count * sizeof(T) + 64;
        if (bytes > size) {
            memory.reset();
            memory.reset(new char[bytes]);
            size = bytes;
        }
        return (T*)(((uintptr_t)memory.get() + 63) / 64 * 64);
    }
};

// Spins, as phases take microseconds; gives the core away where that does not help (more threads than cores).
class Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> generation{0};

  public:
    void wait(int threads) {
        const int mine = generation.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            generation.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation.load(std::memory_order_acquire) == mine; ++spins)
            if (spins < 4000)
                PAUSE();
            else
                sched_yield();
    }
};

using Scratch = std::array<Buffer, 8>;

// torch's own OpenMP: two runtimes in one process would fight for the cores.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel, or null for one thread
    int (*num_threads)();                                          // omp_get_num_threads
};

struct Team {
    struct alignas(64) Counter {
        std::atomic<int> next{0};
    };
    Barrier barrier;
    std::vector<Counter> counters;
    std::vector<Scratch> scratch;
    double seconds[PHASES] = {};
};

inline double clock_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One thread's part of a forward: a sequence of phases, each a number of units handed out as threads come for them.
struct Member {
    Team& team;
    const int index, threads;
    Scratch& scratch;
    int phase = 0;
    double last = clock_seconds();

    template <class Fn>
    void units(Phase name, int count, const Fn& fn) {
        auto& next = team.counters[phase++].next;
        for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) fn(i);
        finish(name);
    }
    template <class Fn>
    void single(Phase name, const Fn& fn) {
        ++phase;
        if (index == 0) fn();
        finish(name);
    }

  private:
    void finish(Phase name) {
        const double done = clock_seconds();
        team.barrier.wait(threads);
        if (index > 0) return;
        team.seconds[name] += done - last;
        last = clock_seconds();
        team.seconds[WAITING] += last - done;
    }
};

// Runs body(member) on every thread; `phases` at most as many as it has.
template <class Body>
void run_team(Team& team, const OpenMP& openmp, int threads, int phases, const Body& body) {
    struct Job {
        Team& team;
        const OpenMP& openmp;
        const Body& body;
        std::atomic<int> next_index{0};
        static void enter(void* data) {
            Job& job = *(Job*)data;
            const int index = job.next_index.fetch_add(1);
            // Fewer than asked for where the program has limited them.
            const int threads = job.openmp.parallel ? job.openmp.num_threads() : 1;
            Member member{job.team, index, threads, job.team.scratch[index]};
            job.body(member);
        }
    };
    std::vector<Team::Counter> fresh(phases);
    team.counters.swap(fresh);
    if ((int)team.scratch.size() < threads) team.scratch.resize(threads);
    Job job{team, openmp, body};
    if (openmp.parallel && threads > 1)
        openmp.parallel(Job::enter, &job, threads, 0);
    else {
        const OpenMP none{nullptr, nullptr};
        Job alone{team, none, body};
        Job::enter(&alone);
    }
}
