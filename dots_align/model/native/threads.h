// Work handed out in units to the threads of torch's own OpenMP runtime. Which thread does a unit never shows in numbers.
#pragma once

#include <atomic>

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel; null where there is none
    int threads;
};

template <class Fn>
static void each_unit(const OpenMP& openmp, int count, const Fn& fn) {
    struct Job {
        std::atomic<int> next{0};
        const int count;
        const Fn& fn;
        Job(int count, const Fn& fn) : count(count), fn(fn) {}
        static void enter(void* data) {
            Job& job = *(Job*)data;
            for (int unit; (unit = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.fn(unit);
        }
    } job(count, fn);
    const int threads = openmp.threads < count ? openmp.threads : count;
    if (openmp.parallel && threads > 1)
        openmp.parallel(Job::enter, &job, threads, 0);
    else
        Job::enter(&job);
}
