//! Checks every request of a plain HTTP/1 connection, and says how many of the guest's bytes may pass.
//!
//! A connection carries many requests, each with a name of its own, so [`Filter`] follows it to the end:
//! heads are held until they are whole and judged, bodies pass as they come and are not copied. Where
//! servers disagree on where a request ends or whom it is for (RFC 9112 §11.2), it is refused rather than
//! guessed: two Hosts, a length beside a transfer coding, a bare CR or LF, a folded line, a space before a
//! colon, a chunk's extension.
//!
//! What the server answers is read only where it decides what the guest's next bytes are: after an
//! `Upgrade` or a `CONNECT`, which must be the connection's first request, because otherwise nobody knows
//! which answer is theirs. A 101 ends checking; a tunnel begins anew, as [`Step::Tunnel`].

use httparse::{EMPTY_HEADER, Status};

use self::head::{Body, check_trailer};
pub use self::head::{Request, parse};
use super::probe::{Guess, Probe};
use super::refusal::{InspectRefusal, Spoken};

mod head;
#[cfg(test)]
mod tests;

/// Header lines of one request or answer.
const HEADERS_MAX: usize = 256;
/// Digits of a chunk's size; more would not fit into 63 bits.
const CHUNK_DIGITS_MAX: u32 = 15;
/// The least that ends a head.
const EMPTY_LINE: &[u8] = b"\r\n\r\n";

/// What came of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// [`Filter::seen`] and [`Filter::passed`] say how far it came. Bytes not taken wait for the answer.
    Going,
    /// This is not HTTP.
    NotHttp,
    /// The server took an upgrade: nothing is checked any more.
    Upgraded,
    /// The server opened a tunnel to this port: what follows begins anew.
    Tunnel(u16),
}

/// Follows one connection.
#[derive(Debug)]
pub struct Filter {
    state: State,
    /// A head or trailer that is not whole.
    head: Vec<u8>,
    /// Finds out whether this is HTTP at all; only at first.
    probe: Option<Probe>,
    seen: u64,
    passed: u64,
    /// Whether a request was agreed already.
    later: bool,
}

#[derive(Debug)]
enum State {
    Head,
    Bytes(u64),
    Chunk(Chunk),
    /// After the last chunk: header lines, or none.
    Trailer,
    Answer(Answer),
    Over(Step),
}

#[derive(Debug, Clone, Copy)]
enum Chunk {
    Size { value: u64, digits: u32 },
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
}

/// Waits for a server's status.
#[derive(Debug)]
struct Answer {
    tunnel: Option<u16>,
    head: Vec<u8>,
    /// Whether a line has just begun.
    at_line: bool,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            state: State::Head,
            head: Vec::new(),
            probe: Some(Probe::default()),
            seen: 0,
            passed: 0,
            later: false,
        }
    }
}

impl Filter {
    /// Takes the bytes that follow [`Self::seen`], and asks `judge` about each request whose head is whole.
    ///
    /// # Errors
    /// What `judge` says, or [`InspectRefusal`] for what cannot be followed. What passed before it may pass.
    pub fn read(
        &mut self,
        bytes: &[u8],
        judge: &mut dyn FnMut(&Request) -> Result<(), InspectRefusal>,
    ) -> Result<Step, InspectRefusal> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let taken = match &mut self.state {
                State::Head | State::Trailer => match self.take_head(rest, judge)? {
                    Some(taken) => taken,
                    None => return Ok(Step::NotHttp),
                },
                State::Bytes(left) => {
                    let taken = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= taken as u64;
                    if *left == 0 {
                        self.state = State::Head;
                    }
                    self.passed = self.seen + taken as u64;
                    taken
                }
                State::Chunk(chunk) => {
                    let taken = match chunk.take(rest)? {
                        (taken, Some(next)) => {
                            *chunk = next;
                            taken
                        }
                        (taken, None) => {
                            self.state = State::Trailer;
                            taken
                        }
                    };
                    self.passed = self.seen + taken as u64;
                    taken
                }
                State::Answer(_) => return Ok(Step::Going),
                State::Over(step) => return Ok(*step),
            };
            self.seen += taken as u64;
            rest = &rest[taken..];
        }
        Ok(Step::Going)
    }

    /// Whether the server's next bytes must be shown before they reach the guest.
    pub fn wants_answer(&self) -> bool {
        matches!(self.state, State::Answer(_))
    }

    /// Takes what the server sent.
    ///
    /// # Errors
    /// [`InspectRefusal`] for an answer that is none.
    pub fn read_answer(&mut self, bytes: &[u8]) -> Result<Step, InspectRefusal> {
        let State::Answer(answer) = &mut self.state else {
            return Ok(Step::Going);
        };
        let Some(status) = answer.take(bytes)? else {
            return Ok(Step::Going);
        };
        let step = match (status, answer.tunnel) {
            (101, None) => Step::Upgraded,
            (200..300, Some(port)) => Step::Tunnel(port),
            _ => {
                self.state = State::Head;
                return Ok(Step::Going);
            }
        };
        self.state = State::Over(step);
        Ok(step)
    }

    /// Bytes taken.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Bytes that may pass.
    pub fn passed(&self) -> u64 {
        self.passed
    }

    /// Takes bytes of a head or trailer, at most to its end; `None` if this is not HTTP.
    fn take_head(
        &mut self,
        bytes: &[u8],
        judge: &mut dyn FnMut(&Request) -> Result<(), InspectRefusal>,
    ) -> Result<Option<usize>, InspectRefusal> {
        let mut rest = bytes;
        if let Some(probe) = &mut self.probe {
            let (guess, taken) = probe.read(bytes);
            let (probed, after) = bytes.split_at(taken);
            rest = after;
            match guess {
                Guess::Other => return Ok(None),
                Guess::Undecided => {
                    self.hold(probed)?;
                    return Ok(Some(taken));
                }
                Guess::Http => {
                    self.probe = None;
                    let mut begun = std::mem::take(&mut self.head);
                    begun.extend_from_slice(probed);
                    for byte in begun {
                        self.take_head_byte(byte)?;
                    }
                }
            }
        }
        let mut taken = bytes.len() - rest.len();
        for byte in rest {
            taken += 1;
            if self.take_head_byte(*byte)? {
                self.finish_head(taken, judge)?;
                break;
            }
        }
        Ok(Some(taken))
    }

    /// Whether the head or trailer ends with this byte.
    fn take_head_byte(&mut self, byte: u8) -> Result<bool, InspectRefusal> {
        let after_cr = self.head.last() == Some(&b'\r');
        if after_cr != (byte == b'\n') {
            return Err(malformed("a CR or LF that stands alone"));
        }
        self.hold(&[byte])?;
        Ok(self.head.ends_with(EMPTY_LINE) || (self.head == b"\r\n" && matches!(self.state, State::Trailer)))
    }

    fn hold(&mut self, bytes: &[u8]) -> Result<(), InspectRefusal> {
        if self.head.len() + bytes.len() > super::HELD_BYTES_MAX {
            return Err(InspectRefusal::Limit {
                spoken: Spoken::Http,
                of: "bytes of a head",
                limit: super::HELD_BYTES_MAX,
            });
        }
        self.head.extend_from_slice(bytes);
        Ok(())
    }

    fn finish_head(
        &mut self,
        taken: usize,
        judge: &mut dyn FnMut(&Request) -> Result<(), InspectRefusal>,
    ) -> Result<(), InspectRefusal> {
        let head = std::mem::take(&mut self.head);
        if matches!(self.state, State::Trailer) {
            check_trailer(&head)?;
            self.state = State::Head;
        } else {
            let request = parse(&head)?;
            judge(&request)?;
            self.state = self.after(&request)?;
            self.later = true;
        }
        self.passed = self.seen + taken as u64;
        Ok(())
    }

    fn after(&self, request: &Request) -> Result<State, InspectRefusal> {
        if request.upgrade || request.tunnel.is_some() {
            if self.later {
                return Err(malformed(
                    "an Upgrade or CONNECT that is not the connection's first request",
                ));
            }
            if request.body != Body::Bytes(0) {
                return Err(malformed("an Upgrade or CONNECT with a body"));
            }
            return Ok(State::Answer(Answer {
                tunnel: request.tunnel,
                head: Vec::new(),
                at_line: false,
            }));
        }
        Ok(match request.body {
            Body::Bytes(0) => State::Head,
            Body::Bytes(length) => State::Bytes(length),
            Body::Chunked => State::Chunk(Chunk::Size { value: 0, digits: 0 }),
        })
    }
}

impl Chunk {
    /// Takes bytes: how many, and what comes next; `None` after the last chunk's size.
    fn take(self, bytes: &[u8]) -> Result<(usize, Option<Self>), InspectRefusal> {
        let byte = bytes[0];
        let next = match self {
            Self::Size { value, digits } => match char::from(byte).to_digit(16) {
                Some(digit) if digits < CHUNK_DIGITS_MAX => Self::Size {
                    value: value << 4 | u64::from(digit),
                    digits: digits + 1,
                },
                None if byte == b'\r' && digits != 0 => Self::SizeLf(value),
                _ => return Err(malformed("a chunk's size that is not a plain number")),
            },
            Self::SizeLf(_) if byte != b'\n' => return Err(malformed("a chunk's size without its CRLF")),
            Self::SizeLf(0) => return Ok((1, None)),
            Self::SizeLf(value) => Self::Data(value),
            Self::Data(left) => {
                let taken = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let next = match left - taken as u64 {
                    0 => Self::DataCr,
                    left => Self::Data(left),
                };
                return Ok((taken, Some(next)));
            }
            Self::DataCr if byte == b'\r' => Self::DataLf,
            Self::DataLf if byte == b'\n' => Self::Size { value: 0, digits: 0 },
            Self::DataCr | Self::DataLf => return Err(malformed("a chunk that is longer than its size")),
        };
        Ok((1, Some(next)))
    }
}

impl Answer {
    /// The status, once it is there and final.
    fn take(&mut self, bytes: &[u8]) -> Result<Option<u16>, InspectRefusal> {
        for &byte in bytes {
            if self.head.len() >= super::HELD_BYTES_MAX {
                return Err(InspectRefusal::Limit {
                    spoken: Spoken::Http,
                    of: "bytes of an answer's head",
                    limit: super::HELD_BYTES_MAX,
                });
            }
            self.head.push(byte);
            let ended = byte == b'\n' && self.at_line;
            self.at_line = byte == b'\n' || (self.at_line && byte == b'\r');
            if !ended {
                continue;
            }
            let mut headers = [EMPTY_HEADER; HEADERS_MAX];
            let mut response = httparse::Response::new(&mut headers);
            let status = match response.parse(&self.head) {
                Ok(Status::Complete(_)) => response.code.unwrap_or(0),
                Ok(Status::Partial) | Err(_) => {
                    return Err(malformed("an answer to an Upgrade or CONNECT that is none"));
                }
            };
            // Interim answers come before the one that counts (RFC 9110 §15.2).
            if status == 101 || !(100..200).contains(&status) {
                return Ok(Some(status));
            }
            self.head.clear();
            self.at_line = false;
        }
        Ok(None)
    }
}

fn malformed(why: &'static str) -> InspectRefusal {
    InspectRefusal::Malformed {
        spoken: Spoken::Http,
        why,
    }
}
