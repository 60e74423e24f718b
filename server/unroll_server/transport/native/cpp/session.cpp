#include "session.hpp"

#include <algorithm>
#include <cstring>
#include <exception>

namespace unroll {

namespace {

constexpr int32_t stream_window = 256 << 10;      // bytes that a client may send ahead on a call
constexpr int32_t narrow_window = 4096;             // the same while its calls are refused: more, once one is accepted
constexpr int32_t connection_window = 4 << 20;    // bytes that may be in flight on a connection
constexpr size_t enough_queued = 64 << 10;        // bytes of queued answers of a call above which its writer waits
constexpr size_t prefix = 5;                      // bytes before a message
constexpr size_t tolerated = 4;                   // multiple of the limit of metadata beyond which a stream is reset
constexpr double burst = 10'000;                  // useless frames at once
constexpr double rate = 1'000;                    // useless frames per second
constexpr uint64_t reset_burst = 20'000;          // calls that a client cancels at once
constexpr uint64_t reset_rate = 5'000;            // calls that a client cancels per second
constexpr double calm_after = 1;                  // seconds without a refusal after which windows are wide again
constexpr int most_strikes = 2;                   // early pings before the client is sent ENHANCE_YOUR_CALM
constexpr uint8_t drain_ping[8] = {'d', 'r', 'a', 'i', 'n', 'i', 'n', 'g'};
constexpr char not_http2[] =
    "HTTP/1.1 400 Bad Request\r\n"
    "content-type: text/plain\r\n"
    "content-length: 45\r\n"
    "connection: close\r\n"
    "\r\n"
    "This is a gRPC port. It speaks HTTP/2, only.\n";

constexpr uint8_t constant = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE;

uint8_t* bytes(const char* text) { return reinterpret_cast<uint8_t*>(const_cast<char*>(text)); }

template <size_t N, size_t V>
nghttp2_nv literal(const char (&name)[N], const char (&value)[V]) {
    return {bytes(name), bytes(value), N - 1, V - 1, constant};
}

nghttp2_nv header(std::string_view name, std::string_view value) {
    return {bytes(name.data()), bytes(value.data()), name.size(), value.size(), NGHTTP2_NV_FLAG_NONE};
}

// Appends metadata as on the wire, with binary values encoded.
void add_wire(const Metadata& metadata, Metadata& wire) {
    for (const auto& [name, value] : metadata) wire.emplace_back(name, is_binary(name) ? base64_encoded(value) : value);
}

Metadata wire_of(const Status& status) {
    Metadata wire{{"grpc-status", std::to_string(status.code)}};
    if (!status.details.empty()) wire.emplace_back("grpc-message", percent_encoded(status.details));
    add_wire(status.trailers, wire);
    return wire;
}

// Returns headers that are views of metadata on the wire.
void add_views(const Metadata& wire, std::vector<nghttp2_nv>& headers) {
    for (const auto& [name, value] : wire) headers.push_back(header(name, value));
}

std::vector<nghttp2_nv> response_headers() {
    return {literal(":status", "200"), literal("content-type", "application/grpc"),
            literal("grpc-accept-encoding", accepted_encodings)};
}

nghttp2_option* make_options() {
    nghttp2_option* options;
    if (nghttp2_option_new(&options)) throw std::bad_alloc();
    nghttp2_option_set_no_auto_window_update(options, 1);
    // nghttp2 would keep hundreds of closed streams per connection for a tree of priorities, which gRPC does not use.
    nghttp2_option_set_no_closed_streams(options, 1);
    // In gRPC, values can begin and end with spaces.
    nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(options, 1);
    nghttp2_option_set_stream_reset_rate_limit(options, reset_burst, reset_rate);
    return options;
}

}  // namespace

// Callbacks of nghttp2. No exception may pass through its C code.
struct Callbacks {
    template <class Body>
    static int guarded(Body body) {
        try {
            return body();
        } catch (const std::exception&) {
            return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
    }

    static Session& of(void* data) { return *static_cast<Session*>(data); }

    static int begin_frame(nghttp2_session*, const nghttp2_frame_hd* head, void* data) {
        if (head->type != NGHTTP2_DATA && head->type != NGHTTP2_HEADERS && head->type != NGHTTP2_RST_STREAM)
            of(data).charge();
        return 0;
    }

    static int begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* data) {
        return guarded([&] {
            if (of(data).left_) return int{NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE};
            if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) of(data).begin(frame->hd.stream_id);
            return 0;
        });
    }

    static int add_header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                          const uint8_t* value, size_t value_size, uint8_t, void* data) {
        return guarded([&] {
            Call* call = of(data).call_of(frame->hd.stream_id);
            if (!call) return 0;
            return of(data).add_header(*call, {reinterpret_cast<const char*>(name), name_size},
                                       {reinterpret_cast<const char*>(value), value_size});
        });
    }

    static int add_data(nghttp2_session*, uint8_t, int32_t id, const uint8_t* chunk, size_t size, void* data) {
        return guarded([&] {
            if (Call* call = of(data).call_of(id)) of(data).add_data(*call, chunk, size);
            return 0;
        });
    }

    static int end_frame(nghttp2_session*, const nghttp2_frame* frame, void* data) {
        return guarded([&] {
            Session& session = of(data);
            const bool acknowledges = frame->hd.flags & NGHTTP2_FLAG_ACK;
            if (frame->hd.type == NGHTTP2_SETTINGS) {
                session.greeted_ = true;
                if (acknowledges) session.widen_accepted();
            } else if (frame->hd.type == NGHTTP2_PING && !acknowledges) {
                session.pinged();
            } else if (frame->hd.type == NGHTTP2_PING && !std::memcmp(frame->ping.opaque_data, drain_ping, 8)) {
                session.leave();
            }
            if (frame->hd.type != NGHTTP2_DATA && frame->hd.type != NGHTTP2_HEADERS) return 0;
            const bool ends = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
            if (frame->hd.type == NGHTTP2_DATA && !ends && frame->hd.length == frame->data.padlen) session.charge();
            Call* call = session.call_of(frame->hd.stream_id);
            if (!call) return 0;
            if (!call->headers_done_) session.end_headers(*call);
            if (ends) session.half_close(*call);
            return 0;
        });
    }

    static int sent_frame(nghttp2_session*, const nghttp2_frame* frame, void* data) {
        return guarded([&] {
            Session& session = of(data);
            if (frame->hd.type == NGHTTP2_RST_STREAM && frame->rst_stream.error_code != NGHTTP2_NO_ERROR)
                session.charge();
            if (frame->hd.type != NGHTTP2_DATA && frame->hd.type != NGHTTP2_HEADERS) return 0;
            session.sent();
            const Call* call = session.call_of(frame->hd.stream_id);
            // The rest of a request that is answered is not needed.
            if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM && call && !call->half_closed_)
                return nghttp2_submit_rst_stream(session.http2_, NGHTTP2_FLAG_NONE, call->id_, NGHTTP2_NO_ERROR);
            return 0;
        });
    }

    static int close(nghttp2_session*, int32_t id, uint32_t, void* data) {
        return guarded([&] {
            auto found = of(data).calls_.find(id);
            if (found == of(data).calls_.end()) return 0;
            of(data).close(*found->second);
            of(data).calls_.erase(found);
            return 0;
        });
    }

    static ssize_t read(nghttp2_session*, int32_t, uint8_t* buffer, size_t room, uint32_t* flags,
                        nghttp2_data_source* source, void*) {
        try {
            return static_cast<Call*>(source->ptr)->fill(buffer, room, flags);
        } catch (const std::exception&) {
            return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
    }

    static nghttp2_session_callbacks* make() {
        nghttp2_session_callbacks* callbacks;
        if (nghttp2_session_callbacks_new(&callbacks)) throw std::bad_alloc();
        nghttp2_session_callbacks_set_on_begin_frame_callback(callbacks, begin_frame);
        nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, begin_headers);
        nghttp2_session_callbacks_set_on_header_callback(callbacks, add_header);
        nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, add_data);
        nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, end_frame);
        nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, sent_frame);
        nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, close);
        return callbacks;
    }
};

// ---- Call

std::optional<std::string> Call::receive() {
    if (finished_ || !session_) return {};
    std::string message;
    Status problem;
    const size_t before = inbox_.size();
    const auto result = inbox_.next(encoding_, session_->server_->limits.message, message, problem);
    if (result == MessageReader::Result::message) {
        release(before - inbox_.size());
        return message;
    }
    if (result == MessageReader::Result::incomplete && half_closed_ && inbox_.size()) {
        problem = {internal, "the request ends within a message", {}};
        fail(problem);
    } else if (result == MessageReader::Result::failed) {
        fail(problem);
    } else if (!half_closed_) {
        waiting_ = true;
        release(unconsumed_);
    }
    return {};
}

void Call::release(size_t size) {
    size = std::min(size, unconsumed_);
    unconsumed_ -= size;
    if (!session_ || !size) return;
    nghttp2_session_consume_stream(session_->http2_, id_, size);
    session_->mark();
}

// Updates the server's count of bytes of incomplete messages.
void Call::count() {
    if (!unary_) return;
    session_->server_->unfinished_ += inbox_.size() - counted_;
    counted_ = inbox_.size();
}

void Call::send_headers(const Metadata& metadata) {
    if (!session_ || responded_ || finished_) return;
    initial_ = metadata;
    open_response(false, nullptr);
}

bool Call::send(std::string message) {
    if (!session_ || finished_) return true;
    out_bytes_ += prefix + message.size();
    out_.push_back({std::move(message), 0});
    wake();
    blocked_ = out_bytes_ >= enough_queued;
    return !blocked_;
}

void Call::respond(std::string message, const Metadata& trailers) {
    send(std::move(message));
    finish({ok, {}, trailers});
}

void Call::finish(const Status& status) {
    if (finished_) return;
    finished_ = true;
    status_ = status;
    if (!session_) return;
    session_->server_->deadlines_.erase({deadline, this});
    session_->server_->unexpect(*this, false);
    release(unconsumed_);
    inbox_.clear();
    count();
    if (responded_ || !out_.empty()) {
        wake();
    } else {
        open_response(true, &status_);
    }
}

void Call::refuse(const Refusal& refusal) {
    finished_ = responded_ = true;
    status_.code = refusal.code;
    auto headers = response_headers();
    add_views(refusal.wire, headers);
    nghttp2_submit_response(session_->http2_, id_, headers.data(), headers.size(), nullptr);
    session_->refused();
}

void Call::fail(const Status& problem) {
    if (finished_) return;
    finish(problem);
    if (announced_) session_->server_->emit(Kind::aborted, *this);
}

void Call::wake() {
    if (!responded_) {
        open_response(false, nullptr);
    } else if (deferred_) {
        deferred_ = false;
        nghttp2_session_resume_data(session_->http2_, id_);
    }
    session_->mark();
}

void Call::open_response(bool ends, const Status* status) {
    responded_ = true;
    Metadata wire = ends ? wire_of(*status) : Metadata();
    add_wire(initial_, wire);
    auto headers = response_headers();
    add_views(wire, headers);
    nghttp2_data_provider body{};
    body.source.ptr = this;
    body.read_callback = Callbacks::read;
    nghttp2_submit_response(session_->http2_, id_, headers.data(), headers.size(), ends ? nullptr : &body);
    session_->mark();
}

ssize_t Call::fill(uint8_t* buffer, size_t room, uint32_t* flags) {
    size_t filled = 0;
    while (!out_.empty() && filled < room) {
        auto& [message, sent] = out_.front();
        for (; sent < prefix && filled < room; sent++)
            buffer[filled++] = sent ? static_cast<uint8_t>(message.size() >> (8 * (prefix - 1 - sent))) : 0;
        const size_t size = std::min(room - filled, prefix + message.size() - sent);
        if (sent >= prefix && size) {
            std::memcpy(buffer + filled, message.data() + (sent - prefix), size);
            filled += size;
            sent += size;
        }
        if (sent == prefix + message.size()) out_.pop_front();
    }
    out_bytes_ -= filled;
    if (blocked_ && out_bytes_ < enough_queued / 2) {
        blocked_ = false;
        if (!finished_) session_->server_->emit(Kind::writable, *this);
    }
    if (!out_.empty()) return static_cast<ssize_t>(filled);
    if (finished_) {
        const Metadata wire = wire_of(status_);
        std::vector<nghttp2_nv> trailers;
        add_views(wire, trailers);
        *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
        nghttp2_submit_trailer(session_->http2_, id_, trailers.data(), trailers.size());
    } else if (!filled) {
        deferred_ = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    return static_cast<ssize_t>(filled);
}

// ---- Server

int Server::add_method(const std::string& path, bool streams, int work) {
    methods_.push_back({streams, work});
    return paths_[path] = static_cast<int>(methods_.size()) - 1;
}

std::vector<Session*> Server::take_dirty() {
    for (Session* session : dirty_) session->dirty_ = false;
    return std::exchange(dirty_, {});
}

void Server::expire(double now) {
    while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
        const auto call = deadlines_.begin()->second->shared_from_this();
        call->fail({deadline_exceeded, "Deadline Exceeded", {}});
    }
}

std::vector<Session*> Server::tick(double now) {
    std::vector<Session*> dead;
    for (Session* session : sessions_)
        if (!session->check(now)) dead.push_back(session);
    return dead;
}

void Server::emit(Kind kind, Call& call, std::string message) {
    events_.push_back({kind, call.shared_from_this(), std::move(message)});
}

void Server::refuse(size_t work, const Status& status, Refusal refusal) {
    refusal.code = status.code;
    refusal.wire = wire_of(status);
    refusals_.at(work) = std::move(refusal);
    // Calls that were just handed over are not part of the known work.
    taken_[work] = expected_[work] + ready_[work] + handed_[work];
}

const Refusal* Server::refusal_of(Call& call, double now) {
    if (call.method == no_method) return nullptr;
    const int work = methods_[static_cast<size_t>(call.method)].work;
    if (work < 0) return nullptr;
    const auto kind = static_cast<size_t>(work);
    const Refusal& refusal = refusals_[kind];
    if (now < refusal.until) {
        if (!refusal.rate) return &refusal;
        double before = taken_[kind] * refusal.call;
        const auto due = std::upper_bound(refusal.due.begin(), refusal.due.end(), std::pair{call.deadline, never});
        if (due != refusal.due.begin()) before += std::prev(due)->second;
        if (before && before + 1 > refusal.rate * (call.deadline - now)) return &refusal;
    }
    taken_[kind]++;
    expected_[kind]++;
    call.work_ = work;
    return nullptr;
}

void Server::unexpect(Call& call, bool ready) {
    if (call.work_ < 0) return;
    const auto kind = static_cast<size_t>(std::exchange(call.work_, -1));
    expected_[kind]--;
    if (ready) ready_[kind]++;
}

// ---- Session

Session::Session(std::shared_ptr<Server> server, double now, double age)
    : server_(std::move(server)), now_(now), born_(now), age_(age), heard_(now), allowance_(burst), allowance_at_(now) {
    static nghttp2_session_callbacks* const callbacks = Callbacks::make();
    static nghttp2_option* const options = make_options();
    if (nghttp2_session_server_new2(&http2_, callbacks, this, options)) throw std::bad_alloc();
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
    for (auto& [id, call] : calls_) close(*call);
    calls_.clear();
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
    nghttp2_submit_goaway(http2_, NGHTTP2_FLAG_NONE, last, NGHTTP2_ENHANCE_YOUR_CALM, bytes(reason.data()),
                          reason.size());
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
    for (const auto& [id, call] : calls_)
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
    calls_.emplace(id, std::move(call));
}

int Session::add_header(Call& call, std::string_view name, std::string_view value) {
    if (call.headers_done_) return 0;  // trailers: gRPC requests have none
    call.header_bytes_ += name.size() + value.size() + 32;
    const size_t limit = server_->limits.metadata;
    if (call.header_bytes_ > tolerated * limit) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    if (call.header_bytes_ > limit) return 0;
    if (name == ":path") {
        call.path = value;
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

void Session::reject(Call& call, const char* http_status) {
    call.finished_ = call.responded_ = true;
    const nghttp2_nv status = header(":status", http_status);
    nghttp2_submit_response(http2_, call.id_, &status, 1, nullptr);
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
    if (!call.is_post_) return reject(call, "405");
    if (!call.is_grpc_) return reject(call, "415");
    if (const Status problem = problem_of(call); problem.code != ok) return call.fail(problem);
    const auto found = server_->paths_.find(call.path);
    if (found != server_->paths_.end()) call.method = found->second;
    if (const Refusal* refusal = server_->refusal_of(call, now_)) {
        server_->methods_[static_cast<size_t>(call.method)].refused++;
        return call.refuse(*refusal);
    }
    if (narrow_) widen(call);
    if (call.deadline != never) server_->deadlines_.emplace(call.deadline, &call);
    call.unary_ = call.method != no_method && !server_->methods_[static_cast<size_t>(call.method)].streams;
    if (call.unary_) return;
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
}

}  // namespace unroll
