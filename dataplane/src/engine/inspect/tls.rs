//! Reads the server name of a TLS connection from the guest's bytes, whatever pieces they come in.
//!
//! A hello may be split over segments and over records (RFC 8446 §5.1). Once it is whole, rustls' own
//! acceptor parses it: it is the strictest reader of hellos there is in the tree, and what it refuses
//! (an extension twice, two names, lengths that do not add up) is refused here, because servers do not
//! agree on what such a hello means. The acceptor does not tell whether a hello is encrypted (ECH), and
//! takes an address in the place of a name for no name; so the extensions of a hello that it has taken
//! are looked at once more.
//!
//! The first hello is not always the last: a server may ask for another one (RFC 8446 §4.1.4), and some
//! take the name of the second. So [`Reader`] goes on until the guest's bytes show that no other hello
//! can follow in the clear. It judges no name; that is [`super::Inspector`]'s.
//!
//! Names are compared without case. A trailing dot, an address, a byte that no host name has: not a name
//! (RFC 6066 §3).

use rustls::server::Acceptor;
use vnet_proto::model::Name;

use super::refusal::{InspectRefusal, Spoken};

#[cfg(test)]
mod recorded;
#[cfg(test)]
pub(in crate::engine) mod tests;

/// Hellos of one connection: the first, and the one that a server may ask for.
pub(super) const HELLOS_MAX: usize = 2;

const RECORD_HEADER_BYTES: usize = 5;
/// A record in the clear (RFC 8446 §5.1), and one that is protected (RFC 5246 §6.2.3).
const RECORD_BYTES_MAX: usize = 1 << 14;
const PROTECTED_BYTES_MAX: usize = RECORD_BYTES_MAX + 2048;

const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// Bytes of an alert in the clear (RFC 8446 §6), and of a change of cipher (§5).
const ALERT_BYTES: u8 = 2;
const CHANGE_BYTES: u8 = 1;
/// The high byte of a record's version from which on no server takes a first record for TLS.
const FOREIGN_VERSION: u8 = 0x10;

const CLIENT_HELLO: u8 = 1;
/// Type and length of a handshake message.
const MESSAGE_HEADER_BYTES: usize = 4;

const SERVER_NAME: u16 = 0;
const EARLY_DATA: u16 = 42;
/// RFC 9849, and the draft before it that some clients still send.
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
const ENCRYPTED_SERVER_NAME: u16 = 0xffce;
/// The kind of a name in the extension (RFC 6066 §3).
const HOST_NAME: u8 = 0;

/// What a hello says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The server's name; `None` where the hello has none.
    pub name: Option<Name>,
    /// Whether it carries an encrypted hello, whose name is another one. Clients that have nothing to hide
    /// send the extension too, with noise in it, and cannot be told from those that have (RFC 9849 §6.2).
    pub ech: bool,
    /// Whether protected records may follow at once, before another hello.
    pub(super) early_data: bool,
}

/// What came of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Reading {
    /// All were taken, and more are needed.
    NeedMore,
    /// This is not TLS.
    NotTls,
    /// A hello, which ends with the bytes taken. There may be more bytes: go on with them.
    Hello(Hello),
    /// No other hello can follow in the clear.
    Done,
}

/// Reads the hellos of one connection.
#[derive(Debug, Default)]
pub struct Reader {
    header: [u8; RECORD_HEADER_BYTES],
    header_bytes: usize,
    /// Bytes of the record under way that are still to come.
    left: usize,
    /// Enough was seen to know that a server takes this for TLS.
    is_tls: bool,
    /// A handshake message in the clear, not yet whole.
    message: Vec<u8>,
    /// Bytes taken, and those of them that are no part of an unread hello.
    seen: u64,
    passed: u64,
    hellos: usize,
    early_data: bool,
}

impl Reader {
    /// Takes the bytes that follow [`Self::seen`]; how far it came is there afterwards.
    ///
    /// # Errors
    /// [`InspectRefusal`] where no hello can be read any more.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Reading, InspectRefusal> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.header_bytes < RECORD_HEADER_BYTES {
                self.header[self.header_bytes] = rest[0];
                self.header_bytes += 1;
                self.seen += 1;
                rest = &rest[1..];
                if !self.is_tls && !self.may_be_tls() {
                    return Ok(Reading::NotTls);
                }
                if self.header_bytes == RECORD_HEADER_BYTES && !self.is_in_doubt() {
                    self.is_tls = true;
                    self.check_header()?;
                }
                continue;
            }
            if self.is_in_doubt() {
                return match rest[0] {
                    CLIENT_HELLO => Err(malformed("a record of another version")),
                    _ => Ok(Reading::NotTls),
                };
            }
            let part = &rest[..rest.len().min(self.left)];
            // Before the bytes are taken: what is no hello passes whole.
            if self.header[0] == HANDSHAKE {
                if self.hellos != 0 && self.message.is_empty() && part[0] != CLIENT_HELLO {
                    return Ok(Reading::Done);
                }
                if let Some(hello) = self.take_handshake(part)? {
                    return Ok(Reading::Hello(hello));
                }
            } else {
                if self.header[0] == APPLICATION_DATA && self.hellos == 0 {
                    return Err(malformed("data before a hello"));
                }
                if self.header[0] == APPLICATION_DATA && !self.early_data {
                    return Ok(Reading::Done);
                }
                self.take(part.len());
                self.passed = self.seen;
            }
            rest = &rest[part.len()..];
        }
        Ok(Reading::NeedMore)
    }

    /// Bytes taken.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Bytes that are no part of a hello which is not whole yet.
    pub fn passed(&self) -> u64 {
        self.passed
    }

    /// Whether what is there of the first header may begin TLS. Servers differ: some skip alerts and other small
    /// records before the hello, and some take the first record's version for whatever it is, up to a bound.
    fn may_be_tls(&self) -> bool {
        let [kind, major, _, high, low] = self.header;
        let is = |at: usize, holds: bool| self.header_bytes <= at || holds;
        let holds = |length: [u8; 2]| is(3, high == length[0]) && is(4, low == length[1]);
        is(1, major < FOREIGN_VERSION)
            && match kind {
                HANDSHAKE => major == 3 || is(4, (1..=RECORD_BYTES_MAX).contains(&self.length())),
                ALERT => holds([0, ALERT_BYTES]),
                CHANGE_CIPHER_SPEC => holds([0, CHANGE_BYTES]),
                _ => false,
            }
    }

    /// Whether the whole first header is one of another version, so that the byte behind it tells.
    fn is_in_doubt(&self) -> bool {
        let [kind, major, ..] = self.header;
        !self.is_tls && self.header_bytes == RECORD_HEADER_BYTES && kind == HANDSHAKE && major != 3
    }

    /// Of the record whose header is there.
    fn length(&self) -> usize {
        usize::from(u16::from_be_bytes([self.header[3], self.header[4]]))
    }

    fn check_header(&mut self) -> Result<(), InspectRefusal> {
        let kind = self.header[0];
        self.left = self.length();
        if self.header[1] != 3 {
            return Err(malformed("a record of another version"));
        }
        if kind != HANDSHAKE && !self.message.is_empty() {
            return Err(malformed("another record inside a hello"));
        }
        let most = match kind {
            HANDSHAKE => RECORD_BYTES_MAX,
            CHANGE_CIPHER_SPEC | ALERT | APPLICATION_DATA => PROTECTED_BYTES_MAX,
            _ => return Err(malformed("a record of a kind that no client begins with")),
        };
        if self.left == 0 || self.left > most {
            return Err(malformed("a record that is empty or too long"));
        }
        Ok(())
    }

    /// Takes bytes of a hello, which must end with its record.
    fn take_handshake(&mut self, part: &[u8]) -> Result<Option<Hello>, InspectRefusal> {
        self.message.extend_from_slice(part);
        self.take(part.len());
        if self.message.len() > super::HELD_BYTES_MAX {
            return Err(too_long(Spoken::Tls));
        }
        let Some((hello, length)) = read_hello(&self.message, Spoken::Tls)? else {
            return Ok(None);
        };
        if length != self.message.len() || self.header_bytes != 0 {
            return Err(malformed("more than a hello in its record"));
        }
        self.hellos += 1;
        if self.hellos > HELLOS_MAX {
            return Err(malformed("a third hello"));
        }
        self.early_data |= hello.early_data;
        self.message = Vec::new();
        self.passed = self.seen;
        Ok(Some(hello))
    }

    fn take(&mut self, count: usize) {
        self.seen += count as u64;
        self.left -= count;
        if self.left == 0 {
            self.header_bytes = 0;
        }
    }
}

/// Reads a hello at the beginning of handshake bytes, and how long it is; `None` if it is not whole.
///
/// # Errors
/// [`InspectRefusal`] where that is no hello that can be read.
pub(super) fn read_hello(stream: &[u8], spoken: Spoken) -> Result<Option<(Hello, usize)>, InspectRefusal> {
    let Some((header, rest)) = stream.split_first_chunk::<MESSAGE_HEADER_BYTES>() else {
        return match stream.first() {
            None | Some(&CLIENT_HELLO) => Ok(None),
            Some(_) => Err(no_hello(spoken)),
        };
    };
    let [kind, high, middle, low] = *header;
    if kind != CLIENT_HELLO {
        return Err(no_hello(spoken));
    }
    let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
    if length + MESSAGE_HEADER_BYTES > super::HELD_BYTES_MAX {
        return Err(too_long(spoken));
    }
    if rest.len() < length {
        return Ok(None);
    }
    let message = &stream[..MESSAGE_HEADER_BYTES + length];
    let hello = read_whole(message, spoken)?;
    Ok(Some((hello, message.len())))
}

fn read_whole(message: &[u8], spoken: Spoken) -> Result<Hello, InspectRefusal> {
    let found = accept(message)?;
    let mut hello = Hello {
        name: None,
        ech: false,
        early_data: false,
    };
    // Whatever the acceptor took can be walked through.
    let mut extensions = extensions(message).ok_or(no_hello(spoken))?;
    while let Some((kind, body)) = next_extension(&mut extensions) {
        match kind {
            SERVER_NAME => hello.name = Some(server_name(body, spoken)?),
            EARLY_DATA => hello.early_data = true,
            ENCRYPTED_CLIENT_HELLO | ENCRYPTED_SERVER_NAME => hello.ech = true,
            _ => {}
        }
    }
    if found.as_deref() != hello.name.as_ref().map(Name::as_str) {
        return Err(InspectRefusal::Malformed {
            spoken,
            why: "a server name that is read in two ways",
        });
    }
    Ok(hello)
}

/// Lets rustls' acceptor judge a hello; the name that it found, in lower case.
fn accept(message: &[u8]) -> Result<Option<String>, InspectRefusal> {
    let records = message.len().div_ceil(RECORD_BYTES_MAX);
    let mut wire = Vec::with_capacity(message.len() + records * RECORD_HEADER_BYTES);
    for part in message.chunks(RECORD_BYTES_MAX) {
        let [high, low] = u16::try_from(part.len()).unwrap_or(0).to_be_bytes();
        wire.extend_from_slice(&[HANDSHAKE, 3, 1, high, low]);
        wire.extend_from_slice(part);
    }
    let mut acceptor = Acceptor::default();
    let mut rest = wire.as_slice();
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).is_err() {
            return Err(too_long(Spoken::Tls));
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) if rest.is_empty() => {
                return Ok(accepted.client_hello().server_name().map(str::to_owned));
            }
            Ok(Some(_)) => break,
            Err((error, _)) => return Err(InspectRefusal::Hello(error)),
        }
    }
    Err(malformed("a hello whose lengths do not add up"))
}

/// The extensions of a whole hello (RFC 8446 §4.1.2); nothing where it has none.
fn extensions(message: &[u8]) -> Option<&[u8]> {
    const VERSION_AND_RANDOM_BYTES: usize = 34;
    let mut rest = message.get(MESSAGE_HEADER_BYTES + VERSION_AND_RANDOM_BYTES..)?;
    let session_id = usize::from(*rest.first()?);
    rest = rest.get(1 + session_id..)?;
    take_u16_prefixed(&mut rest)?;
    let compression = usize::from(*rest.first()?);
    rest = rest.get(1 + compression..)?;
    if rest.is_empty() {
        return Some(rest);
    }
    take_u16_prefixed(&mut rest)
}

fn next_extension<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let (kind, after) = rest.split_first_chunk::<2>()?;
    *rest = after;
    Some((u16::from_be_bytes(*kind), take_u16_prefixed(rest)?))
}

fn take_u16_prefixed<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<2>()?;
    let (body, after) = after.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    *rest = after;
    Some(body)
}

/// The one name of a server name extension.
fn server_name(body: &[u8], spoken: Spoken) -> Result<Name, InspectRefusal> {
    let mut rest = body;
    let listed = take_u16_prefixed(&mut rest).filter(|_| rest.is_empty());
    let text = listed.and_then(|list| {
        let (kind, mut rest) = list.split_first()?;
        take_u16_prefixed(&mut rest).filter(|_| *kind == HOST_NAME && rest.is_empty())
    });
    let Some(text) = text else {
        return Err(InspectRefusal::Malformed {
            spoken,
            why: "a server name extension without exactly one host name",
        });
    };
    let bare = std::str::from_utf8(text)
        .ok()
        .filter(|text| text.is_ascii() && !text.ends_with('.'))
        .ok_or_else(|| InspectRefusal::not_a_name(spoken, text, None))?;
    bare.parse()
        .map_err(|error| InspectRefusal::not_a_name(spoken, text, Some(error)))
}

fn malformed(why: &'static str) -> InspectRefusal {
    InspectRefusal::Malformed {
        spoken: Spoken::Tls,
        why,
    }
}

fn no_hello(spoken: Spoken) -> InspectRefusal {
    InspectRefusal::Malformed {
        spoken,
        why: "a handshake that does not begin with a hello",
    }
}

fn too_long(spoken: Spoken) -> InspectRefusal {
    InspectRefusal::Limit {
        spoken,
        of: "bytes",
        limit: super::HELD_BYTES_MAX,
    }
}
