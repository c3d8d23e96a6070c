//! A client's QUIC packets: taken off a datagram, and Initial ones decrypted (RFC 9000 §17, RFC 9001 §5).

use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::quic::{Keys, Version};

use super::{InspectRefusal, malformed};

/// RFC 9000 §17.2.
const CONNECTION_ID_BYTES_MAX: usize = 20;
pub(super) const VERSION_1: u32 = 1;
pub(super) const VERSION_2: u32 = 0x6b33_43cf;
/// Header protection (RFC 9001 §5.4.2): where the sample lies, and how long it is.
const SAMPLE_OFFSET: usize = 4;
const SAMPLE_BYTES: usize = 16;

/// One packet of a datagram, its payload still encrypted.
pub(super) struct Packet<'a> {
    pub(super) kind: Kind,
    pub(super) version: Option<Version>,
    pub(super) to: Id,
    bytes: &'a [u8],
    /// Where the packet number begins.
    number_at: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Initial,
    /// 0-RTT.
    Early,
    Handshake,
    Retry,
    Short,
    Unknown(u32),
}

impl<'a> Packet<'a> {
    /// Takes the next packet off a datagram.
    pub(super) fn split(rest: &mut &'a [u8]) -> Result<Self, InspectRefusal> {
        Self::parse(rest).ok_or(malformed("a packet that is cut short, or not of QUIC"))
    }

    /// RFC 9000 §17, RFC 9369 §3.2.
    pub(super) fn parse(rest: &mut &'a [u8]) -> Option<Self> {
        const LONG: u8 = 0x80;
        let bytes = *rest;
        let first = *bytes.first()?;
        let whole = |kind, version, to| Self {
            kind,
            version,
            to,
            bytes,
            number_at: 0,
        };
        if first & LONG == 0 {
            *rest = &[];
            return Some(whole(Kind::Short, None, Id::EMPTY));
        }
        let number = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?);
        let (version, types) = match number {
            VERSION_1 => (
                Version::V1,
                [Kind::Initial, Kind::Early, Kind::Handshake, Kind::Retry],
            ),
            VERSION_2 => (
                Version::V2,
                [Kind::Retry, Kind::Initial, Kind::Early, Kind::Handshake],
            ),
            unknown => {
                *rest = &[];
                return Some(whole(Kind::Unknown(unknown), None, Id::EMPTY));
            }
        };
        // The fixed bit is not looked at: some servers take it for whatever it is (RFC 9287).
        let mut after = &bytes[5..];
        let to = Id::take(&mut after)?;
        Id::take(&mut after)?;
        let kind = types[usize::from(first >> 4 & 3)];
        if kind == Kind::Retry {
            *rest = &[];
            return Some(whole(kind, Some(version), to));
        }
        if kind == Kind::Initial {
            take_prefixed(&mut after)?;
        }
        let length = usize::try_from(take_varint(&mut after)?).ok()?;
        let number_at = bytes.len() - after.len();
        let (packet, next) = bytes.split_at_checked(number_at.checked_add(length)?)?;
        *rest = next;
        Some(Self {
            kind,
            version: Some(version),
            to,
            bytes: packet,
            number_at,
        })
    }

    /// Decrypts a client's Initial packet with the keys of an id: where its frames lie in `scratch`.
    pub(super) fn decrypt(
        &self,
        version: Version,
        id: &Id,
        scratch: &mut Vec<u8>,
    ) -> Option<std::ops::Range<usize>> {
        let suite = TLS13_AES_128_GCM_SHA256.tls13()?.quic_suite()?;
        let keys = Keys::initial(
            version,
            suite.suite,
            suite.quic,
            id.as_slice(),
            rustls::Side::Server,
        );
        scratch.clear();
        scratch.extend_from_slice(self.bytes);
        let sample_at = self.number_at + SAMPLE_OFFSET;
        let sample = self.bytes.get(sample_at..sample_at + SAMPLE_BYTES)?;
        let (first, after) = scratch.split_first_mut()?;
        let number = after.get_mut(self.number_at - 1..self.number_at - 1 + SAMPLE_OFFSET)?;
        keys.remote.header.decrypt_in_place(sample, first, number).ok()?;
        let number_bytes = usize::from(*first & 3) + 1;
        // Nothing of the client's was acknowledged when it sends its first packets, so that the numbers
        // stand there whole (RFC 9000 §17.1).
        let number = number[..number_bytes]
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (header, payload) = scratch.split_at_mut(self.number_at + number_bytes);
        let start = header.len();
        let frames = keys
            .remote
            .packet
            .decrypt_in_place(number, header, payload)
            .ok()?;
        // A packet without a frame is an error of the protocol (RFC 9000 §12.4).
        (!frames.is_empty()).then_some(start..start + frames.len())
    }
}

/// A connection id.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Id {
    bytes: [u8; CONNECTION_ID_BYTES_MAX],
    pub(super) length: usize,
}

impl Id {
    const EMPTY: Self = Self {
        bytes: [0; CONNECTION_ID_BYTES_MAX],
        length: 0,
    };

    fn take(rest: &mut &[u8]) -> Option<Self> {
        let (length, after) = rest.split_first()?;
        let length = usize::from(*length);
        let (bytes, after) = after.split_at_checked(length)?;
        let mut id = Self {
            length,
            ..Self::EMPTY
        };
        id.bytes.get_mut(..length)?.copy_from_slice(bytes);
        *rest = after;
        Some(id)
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// A number of one, two, four or eight bytes (RFC 9000 §16).
pub(super) fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let length = 1usize << (rest.first()? >> 6);
    let (bytes, after) = rest.split_at_checked(length)?;
    *rest = after;
    let first = u64::from(bytes[0] & 0x3f);
    Some(
        bytes[1..]
            .iter()
            .fold(first, |sum, byte| sum << 8 | u64::from(*byte)),
    )
}

pub(super) fn take_prefixed<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take_varint(rest)?).ok()?;
    let (body, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(body)
}
