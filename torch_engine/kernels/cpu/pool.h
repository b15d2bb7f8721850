// Threads that share out the pieces of one job at a time.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int kSpins = 2000;                // about 30 us of waiting for the next job before a worker sleeps

// Threads for one caller at a time. The caller works too and waits only for pieces that a worker has
// claimed, never for a worker to show up: where the server, its clients and the engine share the cores, a
// barrier (OpenMP) would stand still for a scheduler's time slice whenever a thread is not running.
class Pool {
   public:
    ~Pool() { resize(1); }

    void resize(int threads) {
        stop_ = true;
        ticket_.fetch_add(uint64_t{1} << 32);
        ticket_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stop_ = false;
        for (int i = 1; i < threads; i++) workers_.emplace_back([this] { serve(); });
    }

    int64_t threads() const { return workers_.size() + 1; }

    // Calls body(i) for every i in [0, count), in any order, on any thread.
    template <class Body>
    void run(int64_t count, bool parallel, const Body& body) {
        if (!parallel || count < 2 || workers_.empty()) {
            for (int64_t i = 0; i < count; i++) body(i);
            return;
        }
        call_ = [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
        context_ = &body;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t next = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(next << 32 | static_cast<uint64_t>(count), std::memory_order_release);
        ticket_.notify_all();
        while (work()) {
        }
        while (done_.load(std::memory_order_acquire) != count) pause();
    }

   private:
    // A ticket is the job's number and how many of its pieces nobody has claimed. Claiming is one compare
    // and swap: a worker that slept through a job cannot claim a piece of it any more, and the job's own
    // data stay valid as long as a claimed piece is not done.
    bool work() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (static_cast<uint32_t>(ticket) != 0) {
            if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
                call_(context_, static_cast<int64_t>(static_cast<uint32_t>(ticket)) - 1);
                done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    void serve() {
        int idle = 0;
        while (!stop_) {
            const uint64_t seen = ticket_.load(std::memory_order_acquire);
            if (work()) {
                idle = 0;
            } else if (++idle < kSpins) {
                pause();
            } else {
                ticket_.wait(seen);
                idle = 0;
            }
        }
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }

    std::vector<std::thread> workers_;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    void (*call_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
};


}  // namespace
