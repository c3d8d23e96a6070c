//! One question to one server: UDP, then TCP if the answer does not fit.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::egress::resolver::ResolverCounts;
use crate::engine::gateway::dns::message::{question_of, same_question};
use crate::engine::gateway::dns::stream::framed;

/// Room for a datagram. Twice what is asked for, since not every server keeps to it.
const DATAGRAM_BYTES_MAX: usize = 4_096;
/// Stray datagrams that are looked at before a server is given up.
const MISMATCHES_MAX: usize = 64;
const HEADER_BYTES: usize = 12;
const TRUNCATED: u8 = 0x02;
const FORMERR: u8 = 1;
const SERVFAIL: u8 = 2;
const NOTIMP: u8 = 4;
const REFUSED: u8 = 5;

/// A question that is being asked.
pub(super) struct Exchange<'a> {
    /// The query, with whatever id.
    pub(super) query: &'a [u8],
    /// Its question.
    pub(super) question: &'a [u8],
    pub(super) counts: &'a ResolverCounts,
}

/// What a server said.
pub(super) enum Outcome {
    /// An answer that stands, NXDOMAIN included.
    Answer(Vec<u8>),
    /// It cannot or will not answer.
    Fault(Vec<u8>),
    /// Nothing in time.
    Silence,
}

impl Exchange<'_> {
    /// Asks one server, waiting so long for each step.
    pub(super) async fn ask(&self, server: SocketAddr, patience: Duration) -> io::Result<Outcome> {
        let asked = timeout(patience, self.ask_udp(server, self.query)).await;
        let Ok(answer) = asked else {
            return Ok(Outcome::Silence);
        };
        let mut answer = answer?;
        // A server from before EDNS refuses the form (RFC 6891 §7); without it, it knows the question.
        if matches!(code(&answer), FORMERR | NOTIMP)
            && let Some(plain) = self.without_edns()
            && let Ok(again) = timeout(patience, self.ask_udp(server, &plain)).await
        {
            answer = again?;
        }
        if answer[2] & TRUNCATED != 0 {
            self.counts.over_tcp.fetch_add(1, Relaxed);
            // Without TCP the cut answer is still the truth: the guest learns that it was cut.
            if let Ok(Ok(whole)) = timeout(patience, self.ask_tcp(server)).await {
                answer = whole;
            }
        }
        Ok(match code(&answer) {
            FORMERR | SERVFAIL | NOTIMP | REFUSED => Outcome::Fault(answer),
            _ => Outcome::Answer(answer),
        })
    }

    async fn ask_udp(&self, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
        let any: SocketAddr = match server {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any).await?;
        socket.connect(server).await?;
        let query = with_random_id(query)?;
        socket.send(&query).await?;
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        for _ in 0..MISMATCHES_MAX {
            let length = socket.recv(&mut buffer).await?;
            if self.is_answer(&query, &buffer[..length]) {
                buffer.truncate(length);
                return Ok(buffer);
            }
            self.counts.mismatched.fetch_add(1, Relaxed);
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{server} sent only answers to other questions"),
        ))
    }

    async fn ask_tcp(&self, server: SocketAddr) -> io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let query = with_random_id(self.query)?;
        let bytes = framed(&query).ok_or(io::ErrorKind::InvalidInput)?;
        stream.write_all(&bytes).await?;
        let length = usize::from(stream.read_u16().await?);
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).await?;
        if self.is_answer(&query, &answer) {
            return Ok(answer);
        }
        self.counts.mismatched.fetch_add(1, Relaxed);
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{server} answered another question"),
        ))
    }

    /// A response, under the id that was sent, to the question that was sent.
    fn is_answer(&self, query: &[u8], answer: &[u8]) -> bool {
        answer.len() >= HEADER_BYTES
            && answer[..2] == query[..2]
            && answer[2] & 0xf8 == 0x80
            && question_of(answer).is_some_and(|question| same_question(question, self.question))
    }

    /// The query with nothing but its question; `None` if that is all it has.
    fn without_edns(&self) -> Option<Vec<u8>> {
        let end = HEADER_BYTES + self.question.len();
        let mut plain = self.query.get(..end).filter(|_| self.query.len() > end)?.to_vec();
        plain[6..HEADER_BYTES].fill(0);
        Some(plain)
    }
}

fn code(answer: &[u8]) -> u8 {
    answer[3] & 0xf
}

fn with_random_id(query: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = query.to_vec();
    getrandom::fill(&mut bytes[..2]).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}
