//! A request's head: where it ends, and what it asks for. Pure.
//!
//! Reading is the crate httparse's. What Go's net/http checks beyond it, and its reading of paths and parameters,
//! is done as there, so that what the peer's clients send means the same.

use std::net::SocketAddr;

use httparse::Header;

use crate::requests::answer::Answer;
use crate::requests::tunnel::{decode, tunnel_target};

/// Headers of one request.
const HEADERS_MAX: usize = 100;
/// Times that a head is read before it is whole: empty lines in front of it look like its end.
const ATTEMPTS_MAX: usize = 8;

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// To be a guest.
    Connect,
    /// A way to this place in the network.
    Tunnel(SocketAddr),
    /// Anything else.
    Other {
        /// It wants no body in the answer.
        is_head: bool,
    },
}

/// Looks for the end of a head while it grows. What was looked at is not looked at again.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// Bytes that hold no end.
    seen: usize,
    attempts: usize,
    has_line: bool,
}

impl Search {
    /// Looks at everything read so far; what is asked for, and the head's length, once that is whole.
    ///
    /// # Errors
    /// What to answer to one that is not understood.
    pub(super) fn look(&mut self, read: &[u8]) -> Result<Option<(Request, usize)>, Answer> {
        // Who speaks something else is told with its first line, and need not be waited for.
        let is_first_line = !self.has_line && read.contains(&b'\n');
        self.has_line |= is_first_line;
        let from = self.seen.saturating_sub(END_BYTES_MAX - 1);
        let has_end =
            read[from..].windows(2).any(|w| w == b"\n\n") || read[from..].windows(3).any(|w| w == b"\n\r\n");
        self.seen = read.len();
        if !is_first_line && !has_end {
            return Ok(None);
        }
        self.attempts += 1;
        if self.attempts > ATTEMPTS_MAX {
            return Err(Answer::NO_HTTP);
        }
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(read) {
            Ok(httparse::Status::Complete(length)) => Ok(Some((understand(&request)?, length))),
            Ok(httparse::Status::Partial) => Ok(None),
            Err(httparse::Error::TooManyHeaders) => Err(Answer::TOO_LONG),
            Err(httparse::Error::Version) => Err(Answer::VERSION),
            Err(_) => Err(Answer::NO_HTTP),
        }
    }
}

fn understand(request: &httparse::Request<'_, '_>) -> Result<Request, Answer> {
    let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
        return Err(Answer::NO_HTTP);
    };
    let headers: &[Header<'_>] = request.headers;
    let has = |name: &str| {
        headers
            .iter()
            .filter(|h| h.name.eq_ignore_ascii_case(name))
            .count()
    };
    match has("Host") {
        // Its value may be empty: the peer's clients send it so.
        0 if version == 1 && method != "CONNECT" => return Err(Answer::NO_HOST),
        0 | 1 => {}
        _ => return Err(Answer::HOSTS),
    }
    let target = origin_form(target);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = decode(path, false).ok_or(Answer::NO_HTTP)?;
    let request = match path.as_slice() {
        b"/connect" => Request::Connect,
        b"/tunnel" => Request::Tunnel(tunnel_target(query).map_err(Answer::parameters)?),
        _ => {
            return Ok(Request::Other {
                is_head: method == "HEAD",
            });
        }
    };
    // Loopback is within reach of every page that a browser of the host shows. It says so.
    if has("Origin") + has("Sec-Fetch-Site") > 0 {
        return Err(Answer::BROWSER);
    }
    Ok(request)
}

/// The path and query of a request's target, which may be a whole URL (RFC 9112 §3.2.2).
fn origin_form(target: &str) -> &str {
    let Some((scheme, rest)) = target.split_once("://") else {
        return target;
    };
    if scheme.is_empty() || !scheme.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return target;
    }
    match rest.find(['/', '?']) {
        Some(at) => &rest[at..],
        None => "/",
    }
}

/// `\n\r\n`.
const END_BYTES_MAX: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn look(text: &str) -> Result<Option<(Request, usize)>, Answer> {
        Search::default().look(text.as_bytes())
    }

    fn asked(text: &str) -> Request {
        let (request, length) = look(text).unwrap().expect("it is whole");
        assert_eq!(length, text.len());
        request
    }

    fn refused(text: &str) -> String {
        let answer = look(text).unwrap_err();
        format!("{}: {}", &answer.status[..3], answer.text)
    }

    fn tunnel(query: &str) -> Result<Request, String> {
        let text = format!("POST /tunnel{query} HTTP/1.1\r\nHost: x\r\n\r\n");
        match look(&text) {
            Ok(found) => Ok(found.unwrap().0),
            Err(answer) => {
                assert_eq!(answer.status, "500 Internal Server Error");
                Err(answer.text.into_owned())
            }
        }
    }

    #[test]
    fn connect_is_asked_for_in_every_way_that_clients_do() {
        for text in [
            "POST /connect HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n\r\n",
            "POST /connect HTTP/1.1\r\nHost:\r\n\r\n",
            "GET /connect HTTP/1.0\r\n\r\n",
            "PUT /connect?x=1 HTTP/1.1\r\nhost: a\r\nContent-Length: 0\r\n\r\n",
            "GET http://localhost/connect HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "POST /%63onnect HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST /connect HTTP/1.1\nHost: a\n\n",
            "\r\nPOST /connect HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert_eq!(asked(text), Request::Connect, "{text:?}");
        }
    }

    #[test]
    fn everything_else_is_somebody_elses() {
        for text in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST /services/forwarder/expose HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
            "GET /connect/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET //connect HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /?/connect HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://connect HTTP/1.1\r\nHost: a\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT a:443 HTTP/1.1\r\n\r\n",
            "GET /page HTTP/1.1\r\nHost: a\r\nOrigin: http://page.test\r\n\r\n",
        ] {
            assert_eq!(asked(text), Request::Other { is_head: false }, "{text:?}");
        }
        let head = asked("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(head, Request::Other { is_head: true });
    }

    #[test]
    fn what_is_no_request_is_refused_with_its_first_line() {
        assert_eq!(refused("\x03\x00\x00\x13\n"), "400: 400 Bad Request");
        assert_eq!(refused("hello there\n"), "400: 400 Bad Request");
        assert!(refused("PRI * HTTP/2.0\r\n\r\n").starts_with("505: "));
        assert_eq!(
            refused("GET /% HTTP/1.1\r\nHost: a\r\n\r\n"),
            "400: 400 Bad Request"
        );
        let no_host = "GET /connect HTTP/1.1\r\nAccept: */*\r\n\r\n";
        assert_eq!(
            refused(no_host),
            "400: 400 Bad Request: missing required Host header"
        );
        let two = "GET /connect HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
        assert_eq!(refused(two), "400: 400 Bad Request: too many Host headers");
        let headers: String = (0..=HEADERS_MAX).map(|n| format!("x{n}: y\r\n")).collect();
        assert!(refused(&format!("GET / HTTP/1.1\r\nHost: a\r\n{headers}\r\n")).starts_with("431: "));
        assert_eq!(look("GET / HTTP/1.1\r\nHost: a\r\n"), Ok(None));
    }

    #[test]
    fn pages_in_browsers_get_no_link_and_no_tunnel() {
        for (path, header) in [
            ("/connect", "Origin: http://page.test"),
            ("/connect", "sec-fetch-site: cross-site"),
            ("/tunnel?ip=192.168.127.2&port=22", "Origin: null"),
        ] {
            let text = format!("POST {path} HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n");
            assert!(refused(&text).starts_with("403: "), "{text:?}");
        }
    }

    #[test]
    fn a_head_is_found_however_it_is_cut_and_what_follows_is_not_of_it() {
        let text = "POST /connect HTTP/1.1\r\nHost: \r\n\r\n\x05\0frame\n\n";
        let length = text.len() - "\x05\0frame\n\n".len();
        for first in 1..length {
            let mut search = Search::default();
            for end in first..length {
                assert_eq!(search.look(&text.as_bytes()[..end]), Ok(None), "{first} {end}");
            }
            assert_eq!(search.look(text.as_bytes()), Ok(Some((Request::Connect, length))));
        }
    }

    #[test]
    fn empty_lines_without_end_are_looked_at_a_few_times_only() {
        let mut search = Search::default();
        let mut text = Vec::new();
        let refused = (0..1_000).find_map(|n| {
            text.extend_from_slice(b"\r\n");
            search.look(&text).err().map(|answer| (n, answer))
        });
        let (rounds, answer) = refused.expect("at some time it is enough");
        assert_eq!(answer, Answer::NO_HTTP);
        assert!(rounds <= ATTEMPTS_MAX);
    }

    #[test]
    fn a_tunnel_leads_where_its_parameters_say_or_is_refused_with_500() {
        let to = Request::Tunnel("192.168.127.2:22".parse().unwrap());
        assert_eq!(tunnel("?ip=192.168.127.2&port=22"), Ok(to));
        assert_eq!(tunnel("?port=22"), Err("ip is mandatory".to_owned()));
    }
}
