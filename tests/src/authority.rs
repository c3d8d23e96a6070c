//! A DNS server with records of any type, that answers as servers do: aliases with what they lead to, codes of every
//! kind, signatures for who wants them, EDNS, and answers that are cut over UDP (RFC 1035, RFC 4035, RFC 6891).
//!
//! Its data are bytes, so that types are served that nothing else here knows. Every query is remembered whole.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vnetctl::sandbox::stage::NetNs;

use crate::servers::inside;

/// The server; it serves until the test ends.
#[derive(Debug, Clone, Default)]
pub struct Authority {
    records: Vec<(String, u16, Vec<u8>)>,
    codes: Vec<(String, u8)>,
    queries: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Authority {
    /// A record: its name, type and data. Signatures (type 46) are added to every answer about their name for who asks
    /// with DO.
    #[must_use]
    pub fn with(mut self, name: &str, kind: u16, data: Vec<u8>) -> Self {
        self.records.push((name.to_owned(), kind, data));
        self
    }

    /// A name that is answered with a code and nothing else.
    #[must_use]
    pub fn fails(mut self, name: &str, code: u8) -> Self {
        self.codes.push((name.to_owned(), code));
        self
    }

    /// Serves on this address, over UDP and TCP.
    ///
    /// # Panics
    /// When it cannot be bound.
    #[must_use]
    pub fn serve(self, namespace: &NetNs, address: &str) -> Self {
        let wanted = address.to_owned();
        let (udp, tcp) = inside(namespace, move || {
            let udp = UdpSocket::bind(&wanted).unwrap_or_else(|error| panic!("{wanted}: {error}"));
            let tcp = TcpListener::bind(&wanted).unwrap_or_else(|error| panic!("{wanted}: {error}"));
            (udp, tcp)
        });
        let own = self.clone();
        thread::spawn(move || {
            let mut query = [0; 4096];
            loop {
                if let Ok((length, from)) = udp.recv_from(&mut query)
                    && let Some(answer) = own.answer(&query[..length], false)
                {
                    let _ = udp.send_to(&answer, from);
                }
            }
        });
        let own = self.clone();
        thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                let mut serve = || -> std::io::Result<()> {
                    stream.read_exact(&mut length)?;
                    let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                    stream.read_exact(&mut query)?;
                    let answer = own.answer(&query, true).unwrap_or_default();
                    let length = u16::try_from(answer.len()).expect("a test's answer fits");
                    stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())
                };
                let _ = serve();
            }
        });
        self
    }

    /// Every query so far, whole.
    pub fn queries(&self) -> Vec<Vec<u8>> {
        self.queries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn answer(&self, query: &[u8], over_tcp: bool) -> Option<Vec<u8>> {
        self.queries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(query.to_vec());
        let question = Question::read(query)?;
        let mut records: Vec<Vec<u8>> = Vec::new();
        let mut wanted = question.name.clone();
        let mut has_signature = false;
        let mut exists = false;
        // As long as one alias leads to another.
        for _ in 0..8 {
            let own: Vec<_> = self.records.iter().filter(|(name, ..)| *name == wanted).collect();
            exists |= !own.is_empty();
            let mut alias = None;
            for (name, kind, data) in own {
                let is_signature = *kind == RRSIG && question.kind != RRSIG;
                has_signature |= is_signature;
                if *kind == CNAME && question.kind != CNAME {
                    alias = Some(text(data));
                }
                let is_meant =
                    *kind == question.kind || *kind == CNAME || (is_signature && question.wants_dnssec);
                if is_meant {
                    records.push(record(&question, name, *kind, data));
                }
            }
            match alias {
                Some(target) => wanted = target,
                None => break,
            }
        }
        let code = self.codes.iter().find(|(name, _)| *name == question.name);
        let code = code.map_or(if exists { 0 } else { NXDOMAIN }, |(_, code)| *code);
        let mut authority = Vec::new();
        if records.is_empty() && matches!(code, 0 | NXDOMAIN) {
            authority.push(record(&question, "example.com", SOA, &soa()));
        }
        let opt = question.room.map(|_| {
            let dnssec = u8::from(question.wants_dnssec) << 7;
            let [high, low] = OPT_BYTES.to_be_bytes();
            vec![0, 0, 41, high, low, 0, 0, dnssec, 0, 0, 0]
        });
        let length = |parts: &[Vec<u8>]| parts.iter().map(Vec::len).sum::<usize>();
        let whole = 12
            + question.bytes.len()
            + length(&records)
            + length(&authority)
            + opt.as_ref().map_or(0, Vec::len);
        let is_cut = !over_tcp && whole > usize::from(question.room.unwrap_or(512).max(512));
        if is_cut {
            records.clear();
            authority.clear();
        }
        let is_authentic = has_signature && (question.wants_dnssec || question.knows_authentic);
        let mut message = query.get(..2)?.to_vec();
        message.push(0x80 | u8::from(is_cut) << 1 | question.flags[0] & 1);
        message.push(0x80 | u8::from(is_authentic) << 5 | question.flags[1] & 0x10 | code);
        let counts = [1, records.len(), authority.len(), usize::from(opt.is_some())];
        for count in counts {
            message.extend(u16::try_from(count).ok()?.to_be_bytes());
        }
        message.extend(&question.bytes);
        message.extend(records.concat());
        message.extend(authority.concat());
        message.extend(opt.unwrap_or_default());
        Some(message)
    }
}

/// What is asked.
struct Question {
    /// In small letters.
    name: String,
    kind: u16,
    /// As it came.
    bytes: Vec<u8>,
    flags: [u8; 2],
    /// Bytes that the client takes over UDP, if it says so.
    room: Option<u16>,
    wants_dnssec: bool,
    knows_authentic: bool,
}

impl Question {
    fn read(query: &[u8]) -> Option<Self> {
        let mut end = 12;
        while *query.get(end)? != 0 {
            end += 1 + usize::from(query[end]);
        }
        let opt = query
            .get(end + 5..)
            .filter(|rest| rest.len() >= 11 && rest[..3] == [0, 0, 41]);
        Some(Self {
            name: text(&query[12..=end]),
            kind: u16::from_be_bytes([*query.get(end + 1)?, *query.get(end + 2)?]),
            bytes: query.get(12..end + 5)?.to_vec(),
            flags: [query[2], query[3]],
            room: opt.map(|opt| u16::from_be_bytes([opt[3], opt[4]])),
            wants_dnssec: opt.is_some_and(|opt| opt[7] & 0x80 != 0),
            knows_authentic: query[3] & 0x20 != 0,
        })
    }
}

/// A record; one of the name that was asked for points to the question.
fn record(question: &Question, owner: &str, kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = if owner == question.name {
        vec![0xc0, 12]
    } else {
        wire_name(owner)
    };
    bytes.extend(kind.to_be_bytes());
    bytes.extend(1u16.to_be_bytes());
    bytes.extend(TTL_SECONDS.to_be_bytes());
    bytes.extend(
        u16::try_from(data.len())
            .expect("a test's record fits")
            .to_be_bytes(),
    );
    bytes.extend(data);
    bytes
}

/// A name as it is sent.
pub fn wire_name(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

fn text(mut wire: &[u8]) -> String {
    let mut labels = Vec::new();
    while let Some((&length @ 1.., rest)) = wire.split_first() {
        let (label, rest) = rest.split_at(usize::from(length).min(rest.len()));
        labels.push(String::from_utf8_lossy(label).to_lowercase());
        wire = rest;
    }
    labels.join(".")
}

/// The data of the zone's own record.
pub fn soa() -> Vec<u8> {
    let mut data = [wire_name("ns1.example.com"), wire_name("admin.example.com")].concat();
    for number in [7u32, 3600, 600, 86400, 60] {
        data.extend(number.to_be_bytes());
    }
    data
}

const CNAME: u16 = 5;
const SOA: u16 = 6;
const RRSIG: u16 = 46;
const NXDOMAIN: u8 = 3;
const TTL_SECONDS: u32 = 60;
/// What the gateway says too, so that answers can be compared.
const OPT_BYTES: u16 = 1_232;
