// The queue of sequences that wait for slots, and the threads that run them.
#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <system_error>

#include "helper.hpp"
#include "network.hpp"

namespace unroll {

namespace {

int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace

class Queue::Turn final : public Source {
public:
    Turn(Queue& queue, std::vector<Ended>& ended) : queue_(queue), ended_(ended), now_(now()) {}

    bool next(Job& job) override {
        const std::lock_guard lock(queue_.lock_);
        while (!queue_.waiting_.empty()) {
            job = queue_.waiting_.front();
            queue_.waiting_.pop_front();
            const auto outcome = stops(job);
            if (!outcome) return true;
            end(job, *outcome);
        }
        return false;
    }

    std::optional<Outcome> stopped(const Job& job) override {
        const std::lock_guard lock(queue_.lock_);
        return stops(job);
    }

    void ended(const Job& job, Outcome outcome) override {
        const std::lock_guard lock(queue_.lock_);
        end(job, outcome);
    }

private:
    std::optional<Outcome> stops(const Job& job) const {
        if (!queue_.cancelled_.empty() && queue_.cancelled_.count(job.ticket)) return Outcome::cancelled;
        if (job.deadline && job.deadline <= now_) return Outcome::expired;
        return std::nullopt;
    }

    void end(const Job& job, Outcome outcome) {
        const auto live = queue_.live_.find(job.ticket);
        const bool last = --live->second == 0;
        if (last) {
            queue_.live_.erase(live);
            queue_.cancelled_.erase(job.ticket);
        }
        queue_.size_--;
        ended_.push_back({job.ticket, outcome, last});
    }

    Queue& queue_;
    std::vector<Ended>& ended_;
    const int64_t now_;
};

Queue::Queue(std::shared_ptr<const Network> network, int64_t slots, int64_t threads, int64_t worthwhile)
    : network(std::move(network)), worthwhile_(worthwhile) {
    for (int64_t thread = 0; thread < threads; thread++)
        slots_.push_back(std::make_unique<Slots>(*this->network, slots));
}

int64_t Queue::submit(std::vector<Job>& jobs) {
    const std::lock_guard lock(lock_);
    const int64_t ticket = ++tickets_;
    live_[ticket] = jobs.size();
    size_ += jobs.size();
    for (Job& job : jobs) {
        job.ticket = ticket;
        waiting_.push_back(job);
    }
    return ticket;
}

bool Queue::cancel(int64_t ticket) {
    const std::lock_guard lock(lock_);
    if (!live_.count(ticket)) return false;
    cancelled_.insert(ticket);
    return true;
}

int64_t Queue::advance(int64_t budget, int64_t rounds, std::vector<Ended>& ended) {
    if (running_.test_and_set()) throw std::logic_error("advance: the last call has not returned");
    const struct Ending {
        std::atomic_flag& flag;
        ~Ending() { flag.clear(); }
    } ending{running_};
    struct Share {
        std::vector<Ended> ended;
        int64_t ran = 0;
    };
    const int64_t count = threads(), most = (size() + count - 1) / count;
    int64_t total = 0;
    std::vector<Share> shares(count);
    std::deque<Turn> turns;
    // Assigned before any thread runs, so that no race decides how many steps a sequence gets.
    for (int64_t thread = 0; thread < count; thread++) {
        slots_[thread]->fill(turns.emplace_back(*this, shares[thread].ended), most);
        total += slots_[thread]->active();
    }
    std::vector<Helper*> others;
    for (int64_t thread = count; thread-- > 0;) {
        const int64_t active = slots_[thread]->active();
        const int64_t own = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(budget) * active / std::max<int64_t>(1, total)));
        const auto run = [=, this, &shares, &turns] {
            shares[thread].ran = slots_[thread]->run(turns[thread], own, rounds, most);
        };
        const double steps = std::min<double>(own, static_cast<double>(rounds) * active);
        try {
            if (thread && steps * network->products() >= worthwhile_) {
                others.push_back(&Helper::claim());
                others.back()->start(run);
                continue;
            }
        } catch (const std::system_error&) {  // no more threads are available
        }
        run();
    }
    for (Helper* other : others) other->finish();
    int64_t ran = 0;
    for (const Share& share : shares) {
        ran += share.ran;
        ended.insert(ended.end(), share.ended.begin(), share.ended.end());
    }
    return ran;
}

int64_t Queue::size() const {
    const std::lock_guard lock(lock_);
    return size_;
}

}  // namespace unroll
