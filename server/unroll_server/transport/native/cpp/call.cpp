// Calls: messages in, answers out.
#include "session.hpp"

#include <algorithm>
#include <cstring>
#include <exception>

namespace unroll {

namespace {

constexpr size_t enough_queued = 64 << 10;        // bytes of queued answers of a call above which its writer waits
constexpr size_t prefix = 5;                      // bytes before a message

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

void add_views(const Metadata& wire, std::vector<nghttp2_nv>& headers) {
    for (const auto& [name, value] : wire) headers.push_back(header(name, value));
}

}  // namespace

std::vector<nghttp2_nv> response_headers(const Metadata& wire) {
    std::vector<nghttp2_nv> headers{literal(":status", "200"), literal("content-type", "application/grpc"),
                                    literal("grpc-accept-encoding", accepted_encodings)};
    headers.reserve(headers.size() + wire.size());
    add_views(wire, headers);
    return headers;
}

Metadata wire_of(const Status& status) {
    Metadata wire{{"grpc-status", std::to_string(status.code)}};
    if (!status.details.empty()) wire.emplace_back("grpc-message", percent_encoded(status.details));
    add_wire(status.trailers, wire);
    return wire;
}

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

void Call::reject(const char* http_status) {
    finished_ = responded_ = true;
    const nghttp2_nv status = header(":status", http_status);
    nghttp2_submit_response(session_->http2_, id_, &status, 1, nullptr);
}

void Call::refuse(const Refusal& refusal) {
    finished_ = responded_ = true;
    status_.code = refusal.code;
    nghttp2_submit_response(session_->http2_, id_, refusal.headers.data(), refusal.headers.size(), nullptr);
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
    const auto headers = response_headers(wire);
    nghttp2_data_provider body{};
    body.source.ptr = this;
    body.read_callback = read;
    nghttp2_submit_response(session_->http2_, id_, headers.data(), headers.size(), ends ? nullptr : &body);
    session_->mark();
}

ssize_t Call::read(nghttp2_session*, int32_t, uint8_t* buffer, size_t room, uint32_t* flags, nghttp2_data_source* source,
                   void*) {
    // No exception may pass through the C code of nghttp2.
    try {
        return static_cast<Call*>(source->ptr)->fill(buffer, room, flags);
    } catch (const std::exception&) {
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
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

}  // namespace unroll
