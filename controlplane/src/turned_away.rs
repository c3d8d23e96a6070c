//! The answer to a peer that is, or may be, of another network namespace: that it is refused, and nothing else.
//!
//! No service, and no reader of HTTP/2, is ever given such a connection. What it says is passed over frame by frame up
//! to its first request, which gets a gRPC status made of constants (RFC 9113 §4 and §6, RFC 7541 §6, gRPC over HTTP/2:
//! "Trailers-Only"). So a client can say why there is no controlplane for it. A few at a time are answered, each for a
//! moment; whoever comes beside them is hung up on without a word, and counted.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Semaphore;

use crate::metrics::Metrics;

/// Answers those who are turned away from one listener.
#[derive(Debug, Clone)]
pub(crate) struct TurnedAway {
    room: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl TurnedAway {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            room: Arc::new(Semaphore::new(AT_ONCE_MAX)),
            metrics,
        }
    }

    /// Answers one with a constant, and hangs up. Never waits.
    pub(crate) fn answer(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        why: &'static str,
    ) {
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else {
            self.metrics.peers_unanswered.add(1);
            return;
        };
        tokio::spawn(async move {
            // However it ends, it is over.
            let _ = tokio::time::timeout(PATIENCE, converse(stream, why)).await;
            drop(permit);
        });
    }
}

async fn converse(mut stream: impl AsyncRead + AsyncWrite + Unpin, why: &str) -> io::Result<()> {
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = reader.take(HEARD_BYTES_MAX);
    pass(&mut reader, PREFACE_BYTES).await?;
    let request = loop {
        let mut head = [0; 9];
        reader.read_exact(&mut head).await?;
        let [a, b, c, kind, _, stream @ ..] = head;
        pass(&mut reader, u64::from(u32::from_be_bytes([0, a, b, c]))).await?;
        if kind == HEADERS {
            break u32::from_be_bytes(stream);
        }
    };
    let mut answer = frame(HEADERS, END_STREAM | END_HEADERS, request, &refusal(why));
    let last = [request.to_be_bytes(), NO_ERROR.to_be_bytes()].concat();
    answer.extend(frame(GOAWAY, 0, 0, &last));
    writer.write_all(&answer).await?;
    // Hung up on now, it might find its own writing failed before it reads.
    tokio::io::copy(&mut reader, &mut tokio::io::sink()).await?;
    Ok(())
}

async fn pass(reader: &mut (impl AsyncRead + Unpin), bytes: u64) -> io::Result<()> {
    let passed = tokio::io::copy(&mut reader.take(bytes), &mut tokio::io::sink()).await?;
    if passed < bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// The header block of a response that is a status and nothing else.
fn refusal(why: &str) -> Vec<u8> {
    let mut block = vec![STATUS_200];
    let code = (tonic::Code::PermissionDenied as i32).to_string();
    for (name, value) in [
        ("content-type", "application/grpc"),
        ("grpc-status", &*code),
        ("grpc-message", why),
    ] {
        block.push(LITERAL);
        for text in [name, value] {
            length(&mut block, text.len());
            block.extend(text.bytes());
        }
    }
    block
}

/// An integer with a prefix of seven bits, without Huffman coding (RFC 7541 §5.1, §5.2).
fn length(block: &mut Vec<u8>, length: usize) {
    const PREFIX: usize = 127;
    if length < PREFIX {
        block.push(length as u8);
        return;
    }
    block.push(PREFIX as u8);
    let mut rest = length - PREFIX;
    while rest >= 128 {
        block.push((rest % 128 + 128) as u8);
        rest /= 128;
    }
    block.push(rest as u8);
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    // Each is a few hundred bytes long.
    let [_, length @ ..] = (payload.len() as u32).to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Those who are answered at once.
const AT_ONCE_MAX: usize = 16;
/// How long one is.
const PATIENCE: Duration = Duration::from_secs(2);
/// What one may say.
const HEARD_BYTES_MAX: u64 = 64 << 10;
/// `PRI * HTTP/2.0` and the rest of it.
const PREFACE_BYTES: u64 = 24;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const NO_ERROR: u32 = 0;
/// `:status: 200`, of the static table.
const STATUS_200: u8 = 0x88;
/// A header whose name and value follow, and which nothing refers to later.
const LITERAL: u8 = 0;

#[cfg(test)]
mod tests {
    use hyper_util::rt::TokioIo;
    use tokio::io::DuplexStream;
    use tonic::transport::{Channel, Endpoint};
    use vnet_proto::v1;
    use vnet_proto::v1::dataplane_service_client::DataplaneServiceClient;
    use vnet_proto::v1::vm_service_client::VmServiceClient;

    use super::*;

    const WHY: &str = "because";

    /// A client's connection to one who turns it away.
    async fn channel() -> Channel {
        let (ours, theirs) = tokio::io::duplex(4096);
        TurnedAway::new(Arc::default()).answer(theirs, WHY);
        let mut ours = Some(TokioIo::new(ours));
        Endpoint::from_static("http://controlplane.test")
            .connect_with_connector(tower::service_fn(move |_| {
                std::future::ready(ours.take().ok_or(io::Error::other("it was used")))
            }))
            .await
            .unwrap()
    }

    /// Everything that is said to one that said this.
    async fn heard(said: &[u8]) -> (Vec<u8>, DuplexStream) {
        let (mut ours, theirs) = tokio::io::duplex(1 << 20);
        TurnedAway::new(Arc::default()).answer(theirs, WHY);
        ours.write_all(said).await.unwrap();
        let mut heard = Vec::new();
        ours.read_to_end(&mut heard).await.unwrap();
        (heard, ours)
    }

    #[tokio::test]
    async fn a_client_is_told_why_whatever_it_asks_for() {
        let request = v1::ListVmsRequest::default();
        let refused = VmServiceClient::new(channel().await).list_vms(request).await;
        let refused = refused.unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (tonic::Code::PermissionDenied, WHY)
        );

        // A stream, whose request has no end.
        let mut sessions = DataplaneServiceClient::new(channel().await);
        let refused = sessions.session(tokio_stream::pending()).await.unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (tonic::Code::PermissionDenied, WHY)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_request_hears_nothing_and_is_hung_up_on() {
        let settings = frame(SETTINGS, 0, 0, &[]);
        let preface = [0; PREFACE_BYTES as usize];
        for said in [
            &b""[..],
            b"GET / HTTP/1.1\r\n\r\n",
            &preface,
            // Frames without end, and one that ends beyond what is heard.
            &[&preface[..], &settings.repeat(HEARD_BYTES_MAX as usize / 9 + 1)].concat(),
            &[&preface[..], &[0xff; 4096]].concat(),
        ] {
            assert_eq!(heard(said).await.0, settings);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_a_few_are_answered_at_once() {
        let metrics = Arc::<Metrics>::default();
        let turned_away = TurnedAway::new(Arc::clone(&metrics));
        let mut silent = Vec::new();
        for _ in 0..AT_ONCE_MAX {
            let (ours, theirs) = tokio::io::duplex(64);
            turned_away.answer(theirs, WHY);
            silent.push(ours);
        }
        assert_eq!(metrics.peers_unanswered.get(), 0);
        let (mut ours, theirs) = tokio::io::duplex(64);
        turned_away.answer(theirs, WHY);
        assert_eq!(ours.read(&mut [0; 64]).await.unwrap(), 0, "not a word");
        assert_eq!(metrics.peers_unanswered.get(), 1);
        // Their time is over.
        tokio::time::sleep(PATIENCE * 2).await;
        let (mut ours, theirs) = tokio::io::duplex(64);
        turned_away.answer(theirs, WHY);
        assert_eq!(ours.read(&mut [0; 64]).await.unwrap(), 9);
        assert_eq!(metrics.peers_unanswered.get(), 1);
    }
}
