//! The head of one HTTP/1 request: whom it is for, and how long its body is (RFC 9112 §3, §6).

use httparse::{EMPTY_HEADER, Status};
use vnet_proto::model::Name;

use super::{HEADERS_MAX, InspectRefusal, Spoken, malformed};

/// A request, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The name that it is for; `None` in HTTP/1.0 without Host.
    pub name: Option<Name>,
    /// The port that a CONNECT asks for.
    pub tunnel: Option<u16>,
    pub(super) upgrade: bool,
    pub(super) body: Body,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    Bytes(u64),
    Chunked,
}

/// Reads a whole head.
///
/// # Errors
/// [`InspectRefusal`] for what two servers could read in two ways, and for what is not followed.
pub fn parse(head: &[u8]) -> Result<Request, InspectRefusal> {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(malformed("a head that ends in two places")),
        Err(httparse::Error::Version) if is_http2(head) => return Err(InspectRefusal::H2c),
        Err(error) => return Err(malformed(parse_error(error))),
    }
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(malformed("a head without a request"));
    };
    // What httparse takes and some servers do not, or take for something else.
    if !head[0].is_ascii_uppercase() || method.bytes().any(|b| b.is_ascii_lowercase()) {
        return Err(malformed("a method that is not in upper case"));
    }
    let fields = Fields::read(request.headers)?;
    if minor == 1 && fields.host.is_none() {
        return Err(InspectRefusal::Missing(Spoken::Http));
    }
    let host = fields.host.map(host_and_port).transpose()?;
    let target = target_name(method, target)?;
    if let (Some(target), Some(host)) = (&target, &host)
        && target.0 != host.0
    {
        return Err(InspectRefusal::Disagree {
            target: target.0.to_string(),
            host: host.0.to_string(),
        });
    }
    let tunnel = match (method, &target) {
        ("CONNECT", Some((_, Some(port)))) => Some(*port),
        ("CONNECT", _) => return Err(malformed("a CONNECT without a port")),
        _ => None,
    };
    Ok(Request {
        name: target.or(host).map(|(name, _)| name),
        tunnel,
        upgrade: fields.upgrade,
        body: fields.body(minor)?,
    })
}

/// The header lines that matter.
#[derive(Default)]
struct Fields<'a> {
    host: Option<&'a [u8]>,
    length: Option<&'a [u8]>,
    coding: Option<&'a [u8]>,
    upgrade: bool,
}

impl<'a> Fields<'a> {
    fn read(headers: &[httparse::Header<'a>]) -> Result<Self, InspectRefusal> {
        let mut fields = Self::default();
        for header in headers {
            let value = header.value.trim_ascii();
            let (slot, twice) = if header.name.eq_ignore_ascii_case("host") {
                (&mut fields.host, "two Hosts")
            } else if header.name.eq_ignore_ascii_case("content-length") {
                (&mut fields.length, "two lengths")
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                (&mut fields.coding, "two transfer codings")
            } else {
                if header.name.eq_ignore_ascii_case("upgrade") {
                    if value.to_ascii_lowercase().windows(3).any(|three| three == b"h2c") {
                        return Err(InspectRefusal::H2c);
                    }
                    fields.upgrade = true;
                }
                continue;
            };
            if slot.replace(value).is_some() {
                return Err(malformed(twice));
            }
        }
        Ok(fields)
    }

    /// How long the body is (RFC 9112 §6.3), where there is no doubt.
    fn body(&self, minor: u8) -> Result<Body, InspectRefusal> {
        match (self.length, self.coding) {
            (None, None) => Ok(Body::Bytes(0)),
            (Some(_), Some(_)) => Err(malformed("a length beside a transfer coding")),
            (None, Some(coding)) if minor == 1 && coding.eq_ignore_ascii_case(b"chunked") => {
                Ok(Body::Chunked)
            }
            (None, Some(_)) => Err(malformed("a transfer coding other than chunked")),
            (Some(length), None) => decimal(length)
                .map(Body::Bytes)
                .ok_or(malformed("a length that is not a plain number")),
        }
    }
}

/// The name in a request's target (RFC 9112 §3.2); `None` where it has none.
fn target_name(method: &str, target: &str) -> Result<Option<(Name, Option<u16>)>, InspectRefusal> {
    if method == "CONNECT" {
        return host_and_port(target.as_bytes()).map(Some);
    }
    if target.starts_with('/') || (method == "OPTIONS" && target == "*") {
        return Ok(None);
    }
    let authority = target
        .split_once("://")
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("http"))
        .map(|(_, rest)| rest.split('/').next().unwrap_or(rest))
        .ok_or(malformed("a target that is neither a path nor an http address"))?;
    host_and_port(authority.as_bytes()).map(Some)
}

/// `host[:port]` (RFC 9110 §7.2), where the host is a name.
fn host_and_port(text: &[u8]) -> Result<(Name, Option<u16>), InspectRefusal> {
    if text.is_empty() {
        return Err(InspectRefusal::Missing(Spoken::Http));
    }
    let not_a_name = |error| InspectRefusal::not_a_name(Spoken::Http, text, error);
    let text = std::str::from_utf8(text)
        .ok()
        .filter(|text| text.is_ascii())
        .ok_or_else(|| not_a_name(None))?;
    let (host, port) = match text.split_once(':') {
        None => (text, None),
        Some((host, digits)) => {
            let port = decimal(digits.as_bytes()).and_then(|port| u16::try_from(port).ok());
            (host, Some(port.ok_or_else(|| not_a_name(None))?))
        }
    };
    let name = host.parse().map_err(|error| not_a_name(Some(error)))?;
    Ok((name, port))
}

/// A number of digits alone, which fits into 63 bits.
fn decimal(digits: &[u8]) -> Option<u64> {
    const DIGITS_MAX: usize = 18;
    if digits.is_empty() || digits.len() > DIGITS_MAX || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(
        digits
            .iter()
            .fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')),
    )
}

pub(super) fn check_trailer(trailer: &[u8]) -> Result<(), InspectRefusal> {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    match httparse::parse_headers(trailer, &mut headers) {
        Ok(Status::Complete((length, lines))) if length == trailer.len() => {
            // Some servers add trailers to the head.
            let fields = Fields::read(lines)?;
            if fields.host.is_some() || fields.length.is_some() || fields.coding.is_some() || fields.upgrade {
                return Err(malformed("a trailer that belongs into the head"));
            }
            Ok(())
        }
        Ok(_) => Err(malformed("a trailer that ends in two places")),
        Err(error) => Err(malformed(parse_error(error))),
    }
}

/// The preface of HTTP/2 without TLS (RFC 9113 §3.4), or anything else of that version.
fn is_http2(head: &[u8]) -> bool {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or(head);
    line.windows(6).any(|six| six == b"HTTP/2")
}

fn parse_error(error: httparse::Error) -> &'static str {
    match error {
        httparse::Error::HeaderName => "a header's name, or what stands before its colon",
        httparse::Error::HeaderValue => "a header's value",
        httparse::Error::NewLine => "an end of line",
        httparse::Error::Status => "a status",
        httparse::Error::Token => "a method or target",
        httparse::Error::TooManyHeaders => "more header lines than are read",
        httparse::Error::Version => "a version other than HTTP/1.0 and HTTP/1.1",
    }
}
