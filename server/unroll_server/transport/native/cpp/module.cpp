// Python bindings of the sessions.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "session.hpp"

namespace nb = nanobind;
using namespace unroll;

namespace {

nb::object text(const std::string& bytes) {
    return nb::steal(PyUnicode_DecodeLatin1(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), nullptr));
}

nb::bytes as_bytes(const std::string& data) { return nb::bytes(data.data(), data.size()); }

std::string as_string(const nb::bytes& data) { return {data.c_str(), data.size()}; }

nb::list metadata_of(const Call& call) {
    nb::list items;
    for (const auto& [name, value] : call.metadata)
        items.append(nb::make_tuple(text(name), is_binary(name) ? nb::object(as_bytes(value)) : text(value)));
    return items;
}

Metadata metadata(const nb::sequence& items) {
    Metadata found;
    for (nb::handle item : items) {
        const nb::object value = item[1];
        found.emplace_back(nb::cast<std::string>(item[0]), nb::isinstance<nb::bytes>(value)
                                                               ? as_string(nb::borrow<nb::bytes>(value))
                                                               : nb::cast<std::string>(value));
    }
    return found;
}

Status status(int code, std::string details, const nb::sequence& trailers) {
    return {code, std::move(details), metadata(trailers)};
}

nb::list events(Server& server) {
    nb::list found;
    for (const Event& event : server.take_events())
        found.append(nb::make_tuple(static_cast<int>(event.kind), event.call, as_bytes(event.message)));
    return found;
}

void respond(const nb::sequence& answers) {
    for (nb::handle answer : answers)
        nb::cast<Call&>(answer[0]).respond(as_string(nb::borrow<nb::bytes>(answer[1])), metadata(nb::borrow<nb::sequence>(answer[2])));
}

nb::list references(const std::vector<Session*>& sessions) {
    nb::list found;
    for (Session* session : sessions) found.append(nb::cast(session, nb::rv_policy::reference));
    return found;
}

// The bytes of an object with the buffer protocol.
class View {
   public:
    explicit View(const nb::object& object) {
        if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_SIMPLE)) throw nb::python_error();
    }
    ~View() { PyBuffer_Release(&buffer_); }
    View(const View&) = delete;
    View& operator=(const View&) = delete;

    const uint8_t* begin() const { return static_cast<const uint8_t*>(buffer_.buf); }
    size_t size() const { return static_cast<size_t>(buffer_.len); }

   private:
    Py_buffer buffer_;
};

std::shared_ptr<Server> make_server(size_t message_bytes, size_t metadata_bytes, size_t unfinished_bytes,
                                    uint32_t calls, double keepalive, double patience, double shortest_pings) {
    return std::make_shared<Server>(
        Limits{message_bytes, metadata_bytes, unfinished_bytes, calls, keepalive, patience, shortest_pings});
}

}  // namespace

NB_MODULE(_http2, module) {
    module.attr("OPENED") = static_cast<int>(Kind::opened);
    module.attr("REQUEST") = static_cast<int>(Kind::request);
    module.attr("READABLE") = static_cast<int>(Kind::readable);
    module.attr("WRITABLE") = static_cast<int>(Kind::writable);
    module.attr("ABORTED") = static_cast<int>(Kind::aborted);
    module.attr("CLOSED") = static_cast<int>(Kind::closed);
    module.attr("NGHTTP2") = nghttp2_version(0)->version_str;

    nb::class_<Call>(module, "Call", nb::dynamic_attr())
        .def_prop_ro("path", &Call::path)
        .def_ro("method", &Call::method)
        .def_ro("began", &Call::began)
        .def_ro("deadline", &Call::deadline)
        .def_rw("reports_end", &Call::reports_end)
        .def_prop_ro("session",
                     [](const Call& call) -> nb::object {
                         Session* session = call.session();
                         return session ? nb::cast(session, nb::rv_policy::reference) : nb::none();
                     })
        .def_prop_ro("metadata", &metadata_of)
        .def("value",
             [](const Call& call, const std::string& name) -> nb::object {
                 for (const auto& [key, value] : call.metadata)
                     if (key == name) return text(value);
                 return nb::none();
             })
        .def_prop_ro("finished", &Call::finished)
        .def_prop_ro("code", &Call::code)
        .def_prop_ro("ended", &Call::ended)
        .def("receive",
             [](Call& call) -> nb::object {
                 const auto message = call.receive();
                 return message ? nb::object(as_bytes(*message)) : nb::none();
             })
        .def("send_headers", [](Call& call, const nb::sequence& items) { call.send_headers(metadata(items)); })
        .def("send", [](Call& call, const nb::bytes& message) { return call.send(as_string(message)); })
        .def("finish", [](Call& call, int code, std::string details, const nb::sequence& trailers) {
            call.finish(status(code, std::move(details), trailers));
        });

    nb::class_<Server>(module, "Server")
        .def(nb::new_(&make_server), nb::kw_only(), nb::arg("message_bytes"), nb::arg("metadata_bytes"),
             nb::arg("unfinished_bytes"), nb::arg("calls"), nb::arg("keepalive"), nb::arg("patience"),
             nb::arg("shortest_pings"))
        .def("add_method", &Server::add_method, nb::arg("path"), nb::arg("streams"), nb::arg("work") = -1)
        .def("refuse",
             [](Server& server, size_t work, double until, double rate, double call,
                std::vector<std::pair<double, double>> due, int code, std::string details,
                const nb::sequence& trailers) {
                 server.refuse(work, status(code, std::move(details), trailers), {until, rate, call, std::move(due), ok, {}});
             })
        .def("take_refused", &Server::take_refused)
        .def("respond", [](Server&, const nb::sequence& answers) { respond(answers); })
        .def("take_events", &events)
        .def("take_dirty", [](Server& server) { return references(server.take_dirty()); })
        .def_prop_ro("has_events", &Server::has_events)
        .def_prop_ro("next_deadline", &Server::next_deadline)
        .def("expire", &Server::expire)
        .def("tick", [](Server& server, double now) { return references(server.tick(now)); });

    nb::class_<Session>(module, "Session", nb::is_weak_referenceable())
        .def(nb::init<std::shared_ptr<Server>, double, double>(), nb::arg("server"), nb::arg("now"),
             nb::arg("age") = 0.0)
        .def("receive",
             [](Session& session, const nb::object& data, double now) {
                 const View view(data);
                 return session.receive(view.begin(), view.size(), now);
             })
        .def("output", [](Session& session, size_t most) { return as_bytes(session.output(most)); })
        .def("drain", &Session::drain)
        .def("lost", &Session::lost)
        .def_prop_ro("over", &Session::over)
        .def_prop_ro("calls", &Session::calls)
        .def_prop_ro("streams", &Session::streams);
}
