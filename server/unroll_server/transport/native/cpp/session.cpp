#include "session.hpp"

#include <algorithm>

namespace unroll {

namespace {

constexpr int32_t stream_window = 256 << 10;      // bytes that a client may send ahead on a call
constexpr int32_t narrow_window = 4 << 10;          // the same while its calls are refused: more, once one is accepted
constexpr int32_t connection_window = 4 << 20;    // bytes that may be in flight on a connection
constexpr size_t tolerated = 4;                   // multiple of the limit of metadata beyond which a stream is reset
constexpr double burst = 10'000;                  // useless frames at once
constexpr double rate = 1'000;                    // useless frames per second
constexpr double calm_after = 1;                  // seconds without a refusal after which windows are wide again
constexpr int most_strikes = 2;                   // early pings before the client is sent ENHANCE_YOUR_CALM
constexpr char not_http2[] =
    "HTTP/1.1 400 Bad Request\r\n"
    "content-type: text/plain\r\n"
    "content-length: 45\r\n"
    "connection: close\r\n"
    "\r\n"
    "This is a gRPC port. It speaks HTTP/2, only.\n";

}  // namespace

Session::Session(std::shared_ptr<Server> server, double now, double age)
    : server_(std::move(server)), now_(now), born_(now), age_(age), heard_(now), allowance_(burst), allowance_at_(now) {
    http2_ = new_http2(*this);
    const Limits& limits = server_->limits;
    const nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, limits.calls},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, stream_window},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<uint32_t>(limits.metadata)},
    };
    nghttp2_submit_settings(http2_, NGHTTP2_FLAG_NONE, settings, std::size(settings));
    nghttp2_session_set_local_window_size(http2_, NGHTTP2_FLAG_NONE, 0, connection_window);
    server_->sessions_.insert(this);
    mark();
}

Session::~Session() {
    lost();
    server_->sessions_.erase(this);
    std::erase(server_->dirty_, this);
}

bool Session::receive(const uint8_t* data, size_t size, double now) {
    if (!http2_ || over()) return false;
    now_ = heard_ = now;
    refused_ = false;
    ping_sent_ = never;
    const ssize_t result = nghttp2_session_mem_recv(http2_, data, size);
    if (result < 0) broken_ = true;
    if (result == NGHTTP2_ERR_BAD_CLIENT_MAGIC && size && data[0] >= ' ' && data[0] <= '~') plain_ = not_http2;
    mark();
    return refused_;
}

std::string Session::output(size_t most) {
    std::string out = std::exchange(plain_, {});
    while (http2_ && !broken_ && out.size() < most) {
        const uint8_t* data;
        const ssize_t size = nghttp2_session_mem_send(http2_, &data);
        if (size < 0) broken_ = true;
        if (size <= 0) break;
        out.append(reinterpret_cast<const char*>(data), static_cast<size_t>(size));
    }
    return out;
}

bool Session::over() const {
    return !http2_ || broken_ || left_ || !(nghttp2_session_want_read(http2_) || nghttp2_session_want_write(http2_));
}

void Session::lost() {
    while (first_) close(*first_);
    nghttp2_session_del(std::exchange(http2_, nullptr));
}

void Session::mark() {
    if (std::exchange(dirty_, true)) return;
    server_->dirty_.push_back(this);
}

void Session::drain() {
    if (!http2_ || leaving_) return;
    leaving_ = true;
    drained_ = now_;
    nghttp2_submit_shutdown_notice(http2_);
    // When this ping is answered, all calls that the client opened before it knew of the drain have been received.
    nghttp2_submit_ping(http2_, NGHTTP2_FLAG_NONE, drain_ping);
    mark();
}

void Session::leave() {
    if (drained_ == never) return;
    drained_ = never;
    const int32_t last = nghttp2_session_get_last_proc_stream_id(http2_);
    nghttp2_submit_goaway(http2_, NGHTTP2_FLAG_NONE, last, NGHTTP2_NO_ERROR, nullptr, 0);
    mark();
}

void Session::calm(std::string_view reason) {
    if (std::exchange(left_, true)) return;
    const int32_t last = nghttp2_session_get_last_proc_stream_id(http2_);
    nghttp2_submit_goaway(http2_, NGHTTP2_FLAG_NONE, last, NGHTTP2_ENHANCE_YOUR_CALM, reinterpret_cast<const uint8_t*>(reason.data()), reason.size());
    mark();
}

bool Session::check(double now) {
    const Limits& limits = server_->limits;
    now_ = now;
    if (!http2_) return true;
    if (now - ping_sent_ > limits.patience || (!greeted_ && now - born_ > limits.patience)) return false;
    if (age_ && now - born_ >= age_) drain();
    if (now - drained_ > limits.patience) leave();
    if (narrow_ && now - refused_at_ > calm_after) narrow(false);
    if (ping_sent_ == never && now - heard_ >= limits.keepalive) {
        ping_sent_ = now;
        nghttp2_submit_ping(http2_, NGHTTP2_FLAG_NONE, nullptr);
        mark();
    }
    return true;
}

void Session::refused() {
    refused_ = true;
    refused_at_ = now_;
    narrow(true);
    mark();
}

void Session::narrow(bool narrow) {
    if (std::exchange(narrow_, narrow) == narrow) return;
    const nghttp2_settings_entry window{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE,
                                        static_cast<uint32_t>(narrow ? narrow_window : stream_window)};
    nghttp2_submit_settings(http2_, NGHTTP2_FLAG_NONE, &window, 1);
    mark();
}

void Session::widen(const Call& call) {
    nghttp2_session_set_local_window_size(http2_, NGHTTP2_FLAG_NONE, call.id_, stream_window);
}

// Calls that were accepted before the client knew of narrow windows have lost theirs.
void Session::widen_accepted() {
    if (!narrow_) return;
    for (const Call* call = first_; call; call = call->next_)
        if (!call->finished_ && !call->half_closed_) widen(*call);
}

void Session::pinged() {
    if (now_ - ping_at_ < server_->limits.shortest_pings && ++ping_strikes_ > most_strikes) calm("too_many_pings");
    ping_at_ = now_;
}

// Useless frames are cheap to send, and so many of them at once are an attack.
void Session::charge() {
    allowance_ = std::min(burst, allowance_ + (now_ - allowance_at_) * rate) - 1;
    allowance_at_ = now_;
    if (allowance_ < 0) calm("too_many_frames");
}

// A client may answer sent frames with pings and window updates.
void Session::sent() {
    allowance_ = std::min(burst, allowance_ + 2);
    ping_at_ = -never;
    ping_strikes_ = 0;
}

void Session::begin(int32_t id) {
    auto call = std::make_shared<Call>(this, id);
    nghttp2_session_set_stream_user_data(http2_, id, call.get());
    open_++;
    call->next_ = first_;
    if (first_) first_->previous_ = call.get();
    first_ = call.get();
    first_->self_ = std::move(call);
}

int Session::add_header(Call& call, std::string_view name, std::string_view value) {
    if (call.headers_done_) return 0;  // trailers: gRPC requests have none
    call.header_bytes_ += name.size() + value.size() + 32;
    const size_t limit = server_->limits.metadata;
    if (call.header_bytes_ > tolerated * limit) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    if (call.header_bytes_ > limit) return 0;
    if (name == ":path") {
        server_->find_method(call, value);
    } else if (name == ":method") {
        call.is_post_ = value == "POST";
    } else if (name == "content-type") {
        call.is_grpc_ = is_grpc(value);
    } else if (name == "te") {
        call.has_te_ = value == "trailers";
    } else if (name == "grpc-encoding") {
        call.encoding_ = encoding_named(value);
    } else if (name == "grpc-timeout") {
        if (const auto seconds = timeout_seconds(value)) call.deadline = now_ + *seconds;
    } else if (is_binary(name)) {
        if (!add_binary(name, value, call.metadata)) call.status_ = {internal, "metadata: not base64", {}};
    } else if (name[0] != ':' && name != "grpc-accept-encoding") {
        call.metadata.emplace_back(name, value);
    }
    return 0;
}

Status Session::problem_of(const Call& call) const {
    if (call.header_bytes_ > server_->limits.metadata)
        return {resource_exhausted, "received metadata size exceeds limit", {}};
    if (!call.has_te_) return {internal, "te: trailers expected", {}};
    if (call.encoding_ == Encoding::unknown) return {unimplemented, "grpc-encoding: not one of those accepted", {}};
    return call.status_;
}

void Session::end_headers(Call& call) {
    call.headers_done_ = true;
    call.began = now_;
    if (!call.is_post_) return call.reject("405");
    if (!call.is_grpc_) return call.reject("415");
    if (const Status problem = problem_of(call); problem.code != ok) return call.fail(problem);
    if (const Refusal* refusal = server_->refusal_of(call, now_)) {
        server_->methods_[static_cast<size_t>(call.method)].refused++;
        return call.refuse(*refusal);
    }
    if (narrow_) widen(call);
    if (call.deadline != never) server_->deadlines_.emplace(call.deadline, &call);
    call.unary_ = call.method != no_method && !server_->methods_[static_cast<size_t>(call.method)].streams;
    if (call.unary_) return;
    streams_++;
    call.announced_ = true;
    server_->emit(Kind::opened, call);
}

void Session::add_data(Call& call, const uint8_t* data, size_t size) {
    // Unread bytes of one call must not block the others.
    nghttp2_session_consume_connection(http2_, size);
    if (call.finished_ || (call.unary_ && call.announced_)) return;
    call.unconsumed_ += size;
    call.inbox_.append(data, size);
    call.count();
    deliver(call);
    if (call.counted_ && server_->unfinished_ > server_->limits.unfinished)
        call.fail({resource_exhausted, "too many bytes of requests that are not complete", {}});
}

void Session::deliver(Call& call) {
    if (!call.unary_) {
        if (!call.waiting_) return;
        if (call.half_closed_ || call.inbox_.ready(server_->limits.message)) {
            call.waiting_ = false;
            server_->emit(Kind::readable, call);
        } else {
            call.release(call.unconsumed_);
        }
        return;
    }
    std::string message;
    Status problem;
    call.release(call.unconsumed_);
    const auto result = call.inbox_.next(call.encoding_, server_->limits.message, message, problem);
    if (result == MessageReader::Result::failed) return call.fail(problem);
    if (result == MessageReader::Result::incomplete) return;
    call.announced_ = true;
    call.inbox_.clear();
    call.count();
    server_->unexpect(call, true);
    server_->emit(Kind::request, call, std::move(message));
}

void Session::half_close(Call& call) {
    call.half_closed_ = true;
    if (call.finished_) return;
    if (call.unary_ && !call.announced_) return call.fail({internal, "the request has no message, or not all of one", {}});
    deliver(call);
}

void Session::close(Call& call) {
    server_->deadlines_.erase({call.deadline, &call});
    server_->unexpect(call, false);
    if (!call.finished_) {
        call.finished_ = true;
        call.status_.code = cancelled;
        if (call.announced_) server_->emit(Kind::aborted, call);
    }
    if (call.reports_end) server_->emit(Kind::closed, call);
    call.inbox_.clear();
    call.count();
    call.out_.clear();
    call.session_ = nullptr;
    open_--;
    if (call.announced_ && !call.unary_) streams_--;
    if (call.next_) call.next_->previous_ = call.previous_;
    (call.previous_ ? call.previous_->next_ : first_) = call.next_;
    call.self_.reset();
}

}  // namespace unroll
