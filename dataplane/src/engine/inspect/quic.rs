//! Reads the server name of QUIC connections from a guest's datagrams.
//!
//! What a client sends first is encrypted with keys that everybody on the path can derive (RFC 9001 §5.2,
//! RFC 9369 for version 2): the hello lies in CRYPTO frames of Initial packets, in pieces, in any order,
//! over several packets and datagrams. rustls derives the keys and decrypts; the frames are put together
//! here, and the hello is read as TLS' is.
//!
//! A UDP association is not a connection: a client may begin a second one to the same address between the
//! same ports, under another name. So every Initial packet of an [`Association`] is read, also after the
//! first hello was agreed. Before one is agreed nothing leaves: datagrams are held. Afterwards a packet
//! that cannot be read is dropped, and one whose hello is not agreed ends the association.
//!
//! Only version 1 and 2 can be read; others, greased ones among them (RFC 9287), are refused. Packets of a
//! connection that moved here from other addresses begin with no Initial, and are refused too.

use std::collections::VecDeque;

use self::packet::{Id, Kind, Packet, take_prefixed, take_varint};
use super::refusal::{InspectRefusal, Spoken};
use super::tls::{self, HELLOS_MAX, Hello};

mod packet;
#[cfg(test)]
pub(in crate::engine) mod tests;

/// Connections of one association that are followed at once; the oldest agreed one is forgotten.
pub const CONNECTIONS_MAX: usize = 4;
/// Datagrams held of one association.
pub const HELD_DATAGRAMS_MAX: usize = 16;
/// Bytes held of one association.
pub const HELD_BYTES_MAX: usize = 32 << 10;
/// Pieces of a hello that do not touch each other.
const PIECES_MAX: usize = 64;

/// The least that a datagram with an Initial may be long (RFC 9000 §14.1): servers drop shorter ones.
const INITIAL_DATAGRAM_BYTES_MIN: usize = 1200;
/// The least that a client's first connection id is long (RFC 9000 §7.2).
const FIRST_CONNECTION_ID_BYTES_MIN: usize = 8;

/// What is done with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It was kept.
    Held,
    /// It may pass, after those that [`Association::take_released`] gives back.
    Pass,
    /// It goes nowhere.
    Drop,
}

/// One UDP association. Whatever came of a datagram, [`Self::take_released`] may have something to send.
#[derive(Default)]
pub struct Association {
    connections: VecDeque<Connection>,
    held: Vec<(u64, Box<[u8]>)>,
    released: Vec<Box<[u8]>>,
    held_bytes: usize,
    next: u64,
    /// Whether a hello was agreed: what has no name of its own may pass.
    agreed: bool,
    scratch: Vec<u8>,
}

struct Connection {
    number: u64,
    /// The id from which the keys are derived: the one that its first packet went to.
    id: Id,
    stream: Stream,
    /// Bytes of the stream that were judged.
    judged: usize,
    hellos: usize,
}

/// Whether a datagram begins as an Initial packet does: one that [`Association`] can read, or of a version that it
/// knows to be QUIC's and cannot read (negotiation and drafts of RFC 9000 §15, and Google's), padded as a client's must
/// be (§14.1).
pub fn looks_like_initial(datagram: &[u8]) -> bool {
    let mut rest = datagram;
    Packet::parse(&mut rest).is_some_and(|packet| match packet.kind {
        Kind::Initial => true,
        Kind::Unknown(version) => datagram.len() >= INITIAL_DATAGRAM_BYTES_MIN && is_of_quic(version),
        Kind::Early | Kind::Handshake | Kind::Retry | Kind::Short => false,
    })
}

fn is_of_quic(version: u32) -> bool {
    let [a, b, c, _] = version.to_be_bytes();
    match (a, b) {
        _ if version == 0 || version & 0x0f0f_0f0f == 0x0a0a_0a0a => true,
        (0xff, 0) => c == 0,
        (b'Q' | b'T', b'0') => true,
        _ => false,
    }
}

impl Association {
    /// Takes a datagram of the guest's, and asks `judge` about each hello in it.
    ///
    /// # Errors
    /// What `judge` says, or [`InspectRefusal`] for what cannot be read before a hello was agreed.
    pub fn handle(
        &mut self,
        datagram: &[u8],
        judge: &mut dyn FnMut(&Hello) -> Result<(), InspectRefusal>,
    ) -> Result<Fate, InspectRefusal> {
        // Connections whose hello was not whole when their packet was read.
        let mut waited = Vec::new();
        let mut rest = datagram;
        while !rest.is_empty() {
            let first = rest.len() == datagram.len();
            let read = Packet::split(&mut rest).and_then(|packet| match packet.kind {
                Kind::Initial => self.read_initial(&packet, datagram.len(), judge),
                Kind::Early => self.find_early(&packet),
                // Behind other packets this may be padding, which servers skip.
                Kind::Short | Kind::Handshake if self.agreed || !first => Ok(Read::Settled),
                Kind::Short | Kind::Handshake => Err(malformed("no Initial packet comes first")),
                Kind::Unknown(version) => Err(InspectRefusal::QuicVersion(version)),
                Kind::Retry => Err(malformed("a packet that only servers send")),
            });
            match read {
                Ok(Read::Settled) => {}
                Ok(Read::Waits(connection)) => waited.push(connection),
                Ok(Read::Refused(refusal)) => return Err(refusal),
                Err(_) if self.agreed => return Ok(Fate::Drop),
                Err(refusal) => return Err(refusal),
            }
        }
        // The rest of the hello may have come in the same datagram.
        let waits = self
            .connections
            .iter()
            .find(|connection| waited.contains(&connection.number) && !connection.is_settled())
            .map(|connection| connection.number);
        match waits {
            None if self.agreed => Ok(Fate::Pass),
            None => Err(malformed("no Initial packet comes first")),
            Some(connection) => {
                self.hold(connection, datagram)?;
                Ok(Fate::Held)
            }
        }
    }

    /// Datagrams that were held and may pass now, oldest first.
    pub fn take_released(&mut self) -> Vec<Box<[u8]>> {
        std::mem::take(&mut self.released)
    }

    /// Whether datagrams wait for the rest of a hello.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    fn hold(&mut self, connection: u64, datagram: &[u8]) -> Result<(), InspectRefusal> {
        for (of, limit, reached) in [
            (
                "datagrams",
                HELD_DATAGRAMS_MAX,
                self.held.len() >= HELD_DATAGRAMS_MAX,
            ),
            (
                "bytes",
                HELD_BYTES_MAX,
                self.held_bytes + datagram.len() > HELD_BYTES_MAX,
            ),
        ] {
            if reached {
                return Err(InspectRefusal::Limit {
                    spoken: Spoken::Quic,
                    of,
                    limit,
                });
            }
        }
        self.held_bytes += datagram.len();
        self.held.push((connection, datagram.into()));
        Ok(())
    }

    fn release(&mut self, connection: u64) {
        for (of, datagram) in std::mem::take(&mut self.held) {
            if of == connection {
                self.held_bytes -= datagram.len();
                self.released.push(datagram);
            } else {
                self.held.push((of, datagram));
            }
        }
    }

    /// Early data goes with the connection that its client asked for.
    fn find_early(&self, packet: &Packet<'_>) -> Result<Read, InspectRefusal> {
        match self.connections.iter().find(|c| c.id == packet.to) {
            Some(connection) if connection.is_settled() => Ok(Read::Settled),
            Some(connection) => Ok(Read::Waits(connection.number)),
            None => Err(malformed("early data without an Initial packet before")),
        }
    }

    fn read_initial(
        &mut self,
        packet: &Packet<'_>,
        datagram_bytes: usize,
        judge: &mut dyn FnMut(&Hello) -> Result<(), InspectRefusal>,
    ) -> Result<Read, InspectRefusal> {
        if datagram_bytes < INITIAL_DATAGRAM_BYTES_MIN {
            return Err(malformed("an Initial packet in a datagram below 1,200 bytes"));
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.decrypt(packet, &mut scratch).and_then(|(place, payload)| {
            let connection = &mut self.connections[place];
            connection.take_frames(payload)?;
            Ok(match connection.judge_hellos(judge) {
                Err(refusal) => Read::Refused(refusal),
                Ok(()) if connection.is_settled() => Read::Settled,
                Ok(()) => Read::Waits(connection.number),
            })
        });
        self.scratch = scratch;
        if let Ok(Read::Settled) = result {
            self.agreed = true;
            let settled: Vec<u64> = self
                .connections
                .iter()
                .filter(|c| c.is_settled())
                .map(|c| c.number)
                .collect();
            for connection in settled {
                self.release(connection);
            }
        }
        result
    }

    /// Decrypts an Initial packet: the place of its connection, a new one if need be, and the frames.
    fn decrypt<'s>(
        &mut self,
        packet: &Packet<'_>,
        scratch: &'s mut Vec<u8>,
    ) -> Result<(usize, &'s [u8]), InspectRefusal> {
        let version = packet.version.ok_or(malformed("a packet without a version"))?;
        // Later packets go to an id that the server chose, under the same keys.
        let known = (0..self.connections.len()).rev().find_map(|place| {
            let range = packet.decrypt(version, &self.connections[place].id, scratch)?;
            Some((place, range))
        });
        let (place, range) = match known {
            Some(found) => found,
            None => {
                // After a Retry it is the server's, which may be shorter.
                if !self.agreed && packet.to.length < FIRST_CONNECTION_ID_BYTES_MIN {
                    return Err(malformed("a connection id below 8 bytes"));
                }
                let range = packet
                    .decrypt(version, &packet.to, scratch)
                    .ok_or(malformed("an Initial packet that does not decrypt"))?;
                (self.open(packet.to)?, range)
            }
        };
        Ok((place, scratch.get(range).unwrap_or_default()))
    }

    fn open(&mut self, id: Id) -> Result<usize, InspectRefusal> {
        if self.connections.len() >= CONNECTIONS_MAX {
            let oldest = self.connections.iter().position(Connection::is_settled);
            let Some(oldest) = oldest else {
                return Err(InspectRefusal::Limit {
                    spoken: Spoken::Quic,
                    of: "connections",
                    limit: CONNECTIONS_MAX,
                });
            };
            self.connections.remove(oldest);
        }
        self.connections.push_back(Connection {
            number: self.next,
            id,
            stream: Stream::default(),
            judged: 0,
            hellos: 0,
        });
        self.next += 1;
        Ok(self.connections.len() - 1)
    }
}

enum Read {
    /// It belongs to what was agreed.
    Settled,
    /// It belongs to a connection whose hello is not whole.
    Waits(u64),
    /// It was read, and may not pass.
    Refused(InspectRefusal),
}

impl Connection {
    /// Whether every byte that was sent belongs to a hello that was agreed.
    fn is_settled(&self) -> bool {
        self.hellos != 0 && self.judged == self.stream.bytes.len()
    }

    fn judge_hellos(
        &mut self,
        judge: &mut dyn FnMut(&Hello) -> Result<(), InspectRefusal>,
    ) -> Result<(), InspectRefusal> {
        while let Some((hello, length)) = tls::read_hello(&self.stream.whole()[self.judged..], Spoken::Quic)?
        {
            if self.hellos >= HELLOS_MAX {
                return Err(malformed("a third hello"));
            }
            judge(&hello)?;
            self.judged += length;
            self.hellos += 1;
        }
        Ok(())
    }

    /// Reads the frames that an Initial packet may have (RFC 9000 §12.4).
    fn take_frames(&mut self, payload: &[u8]) -> Result<(), InspectRefusal> {
        const PADDING: u64 = 0;
        const PING: u64 = 1;
        const ACK: u64 = 2;
        const ACK_ECN: u64 = 3;
        const CRYPTO: u64 = 6;
        const CONNECTION_CLOSE: u64 = 0x1c;
        let broken = || malformed("a frame that is cut short");
        let mut rest = payload;
        while !rest.is_empty() {
            let kind = take_varint(&mut rest).ok_or_else(broken)?;
            match kind {
                PADDING | PING => {}
                ACK | ACK_ECN => skip_ack(&mut rest, kind == ACK_ECN).ok_or_else(broken)?,
                CRYPTO => {
                    let offset = take_varint(&mut rest).ok_or_else(broken)?;
                    let data = take_prefixed(&mut rest).ok_or_else(broken)?;
                    self.stream.insert(offset, data)?;
                }
                CONNECTION_CLOSE => {
                    let closed = take_varint(&mut rest)
                        .and_then(|_| take_varint(&mut rest))
                        .and_then(|_| take_prefixed(&mut rest));
                    closed.ok_or_else(broken)?;
                }
                _ => return Err(malformed("a frame that no Initial packet has")),
            }
        }
        Ok(())
    }
}

fn skip_ack(rest: &mut &[u8], ecn: bool) -> Option<()> {
    take_varint(rest)?;
    take_varint(rest)?;
    let ranges = take_varint(rest)?;
    take_varint(rest)?;
    // Each takes at least two bytes, so this ends with the packet.
    for _ in 0..ranges {
        take_varint(rest)?;
        take_varint(rest)?;
    }
    if ecn {
        for _ in 0..3 {
            take_varint(rest)?;
        }
    }
    Some(())
}

/// The bytes of CRYPTO frames, put together.
#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    /// What of them is there: ranges in order that do not touch.
    pieces: Vec<(usize, usize)>,
}

impl Stream {
    /// The bytes from the beginning to the first gap.
    fn whole(&self) -> &[u8] {
        match self.pieces.first() {
            Some(&(0, end)) => &self.bytes[..end],
            _ => &[],
        }
    }

    /// Adds bytes. What was there already must be the same: a server keeps either.
    fn insert(&mut self, offset: u64, data: &[u8]) -> Result<(), InspectRefusal> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(data.len());
        if end > super::HELD_BYTES_MAX {
            return Err(InspectRefusal::Limit {
                spoken: Spoken::Quic,
                of: "bytes",
                limit: super::HELD_BYTES_MAX,
            });
        }
        if data.is_empty() {
            return Ok(());
        }
        for &(from, to) in &self.pieces {
            let (from, to) = (from.max(start), to.min(end));
            if from < to && self.bytes[from..to] != data[from - start..to - start] {
                return Err(malformed("a hello that says two things in one place"));
            }
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(data);
        self.pieces.push((start, end));
        self.pieces.sort_unstable();
        let mut joined: Vec<(usize, usize)> = Vec::with_capacity(self.pieces.len());
        for &(from, to) in &self.pieces {
            match joined.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => joined.push((from, to)),
            }
        }
        self.pieces = joined;
        if self.pieces.len() > PIECES_MAX {
            return Err(InspectRefusal::Limit {
                spoken: Spoken::Quic,
                of: "pieces",
                limit: PIECES_MAX,
            });
        }
        Ok(())
    }
}

fn malformed(why: &'static str) -> InspectRefusal {
    InspectRefusal::Malformed {
        spoken: Spoken::Quic,
        why,
    }
}
