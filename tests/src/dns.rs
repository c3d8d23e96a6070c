//! A small DNS server (RFC 1035) over UDP and TCP that answers from a list and remembers every question.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vnetctl::sandbox::stage::NetNs;

use crate::servers::inside;

/// What is known of a name.
#[derive(Debug, Clone)]
pub enum Answer {
    /// An address.
    A(&'static str),
    /// An IPv6 address.
    Aaaa(&'static str),
    /// Texts, one record each.
    Txt(Vec<String>),
    /// Another name.
    Cname(&'static str),
}

/// The server; it serves until the test ends.
#[derive(Debug, Clone)]
pub struct Dns {
    known: Arc<Vec<(String, Answer)>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Dns {
    /// Serves on this address. A name that is not listed does not exist.
    ///
    /// # Panics
    /// When the address cannot be bound.
    pub fn serve(namespace: &NetNs, address: &str, known: &[(&str, Answer)]) -> Dns {
        let wanted = address.to_owned();
        let (udp, tcp) = inside(namespace, move || {
            let udp = UdpSocket::bind(&wanted).unwrap_or_else(|error| panic!("{wanted}: {error}"));
            let tcp = TcpListener::bind(&wanted).unwrap_or_else(|error| panic!("{wanted}: {error}"));
            (udp, tcp)
        });
        let dns = Dns {
            known: Arc::new(
                known
                    .iter()
                    .map(|(name, answer)| ((*name).to_owned(), answer.clone()))
                    .collect(),
            ),
            asked: Arc::default(),
        };
        let by_udp = dns.clone();
        thread::spawn(move || {
            let mut query = [0; 4096];
            loop {
                let Ok((length, from)) = udp.recv_from(&mut query) else {
                    continue;
                };
                if let Some(answer) = by_udp.answer(&query[..length], "udp") {
                    let _ = udp.send_to(&answer, from);
                }
            }
        });
        let by_tcp = dns.clone();
        thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let own = by_tcp.clone();
                thread::spawn(move || {
                    let mut length = [0; 2];
                    while stream.read_exact(&mut length).is_ok() {
                        let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                        if stream.read_exact(&mut query).is_err() {
                            return;
                        }
                        let Some(answer) = own.answer(&query, "tcp") else {
                            return;
                        };
                        let length = u16::try_from(answer.len()).expect("a test's answer is short");
                        if stream
                            .write_all(&[&length.to_be_bytes()[..], &answer].concat())
                            .is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        dns
    }

    /// Every question so far, as `udp A name`.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many questions there were for a name, of any type.
    pub fn asked_for(&self, name: &str) -> usize {
        let of = |question: &&String| question.rsplit(' ').next() == Some(name);
        self.asked().iter().filter(of).count()
    }

    fn answer(&self, query: &[u8], by: &str) -> Option<Vec<u8>> {
        let mut name = Vec::new();
        let mut at = 12;
        loop {
            let length = usize::from(*query.get(at)?);
            if length == 0 {
                break;
            }
            name.push(String::from_utf8_lossy(query.get(at + 1..at + 1 + length)?).to_lowercase());
            at += 1 + length;
        }
        let name = name.join(".");
        let kind = u16::from_be_bytes([*query.get(at + 1)?, *query.get(at + 2)?]);
        let question = query.get(12..at + 5)?;
        let word = match kind {
            A => "A".to_owned(),
            AAAA => "AAAA".to_owned(),
            TXT => "TXT".to_owned(),
            other => format!("TYPE{other}"),
        };
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(format!("{by} {word} {name}"));

        let mut records = Vec::new();
        let mut exists = false;
        let mut wanted = name.clone();
        for (owner, known) in self.known.iter() {
            if *owner != wanted {
                continue;
            }
            exists = true;
            let of = |kind: u16, data: &[u8]| record(owner, kind, data);
            match (known, kind) {
                (Answer::A(address), A) => {
                    records.push(of(A, &address.parse::<Ipv4Addr>().ok()?.octets()));
                }
                (Answer::Aaaa(address), AAAA) => {
                    records.push(of(AAAA, &address.parse::<Ipv6Addr>().ok()?.octets()));
                }
                (Answer::Txt(texts), TXT) => {
                    for text in texts {
                        let length = u8::try_from(text.len()).ok()?;
                        records.push(of(TXT, &[&[length], text.as_bytes()].concat()));
                    }
                }
                // What it leads to is listed after it.
                (Answer::Cname(target), _) => {
                    records.push(of(CNAME, &labels(target)));
                    wanted = (*target).to_owned();
                }
                _ => {}
            }
        }
        let mut answers = records.concat();
        let mut count = u16::try_from(records.len()).ok()?;
        // RFC 6891 §6.2.3: without EDNS at most 512 bytes; here that limit holds with it as well.
        let truncated = by == "udp" && 12 + question.len() + answers.len() > 512;
        if truncated {
            answers.clear();
            count = 0;
        }
        let flags = 0x8180 | if truncated { 0x0200 } else { 0 } | if exists { 0 } else { NXDOMAIN };
        let mut message = query.get(..2)?.to_vec();
        for word in [flags, 1, count, 0, 0] {
            message.extend(word.to_be_bytes());
        }
        message.extend(question);
        message.extend(answers);
        Some(message)
    }
}

fn record(owner: &str, kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = labels(owner);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(1u16.to_be_bytes());
    bytes.extend(TTL_SECONDS.to_be_bytes());
    bytes.extend(u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn labels(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

const A: u16 = 1;
const CNAME: u16 = 5;
const TXT: u16 = 16;
const AAAA: u16 = 28;
const NXDOMAIN: u16 = 3;
const TTL_SECONDS: u32 = 60;
