//! Captures on their way to the controlplane: a stream for each, beside the session and no longer than it.

use std::sync::Arc;
use std::time::Duration;

use prost_types::Timestamp;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use vnet_proto::model::VmId;
use vnet_proto::v1;
use vnet_proto::v1::dataplane_service_client::DataplaneServiceClient;

use crate::capture::pcapng::{Direction, SNAP_BYTES_DEFAULT};
use crate::capture::{Capture, CaptureEnd, CaptureSpec, Packet};
use crate::session::commands::{Captures, Refusal};

/// What both sides know a capture by.
pub(super) type Token = [u8; 16];

/// Packets of one message.
const BATCH_PACKETS: usize = 256;
/// Bytes of one message, after which it takes no further packet.
const BATCH_BYTES: usize = 256 << 10;
/// Messages between a capture and the stream's encoder.
const MESSAGES: usize = 2;
/// How long the answer to a capture that is over is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
const NANOSECONDS: u64 = 1_000_000_000;

/// A capture that the controlplane asked for, to be sent.
#[derive(Debug)]
pub(super) struct Asked {
    token: Token,
    capture: Arc<Capture>,
    woken: Arc<Notify>,
    duration: Option<Duration>,
}

impl Asked {
    /// Begins what was asked for.
    pub(super) fn begin(asked: &v1::StartCapture, captures: &dyn Captures) -> Result<Self, Refusal> {
        let token = token(&asked.token)?;
        let filter = asked.filter.parse();
        let filter = filter.map_err(|error| Refusal::invalid(format!("filter: {error}")))?;
        let duration = asked.duration.map(Duration::try_from).transpose();
        let duration = duration.map_err(|_| Refusal::invalid("duration is no length of time"))?;
        let spec = CaptureSpec {
            filter,
            snap_bytes: match asked.snap_length {
                0 => SNAP_BYTES_DEFAULT,
                bytes => bytes.min(SNAP_BYTES_DEFAULT),
            },
            packets_max: (asked.max_packets != 0).then_some(asked.max_packets),
            ends_with_guest: true,
        };
        let woken = Arc::new(Notify::new());
        let wake = {
            let woken = Arc::clone(&woken);
            move || woken.notify_one()
        };
        let capture = captures.start_capture(VmId(asked.vm), spec, Box::new(wake))?;
        Ok(Self {
            token,
            capture,
            woken,
            duration,
        })
    }

    pub(super) fn token(&self) -> Token {
        self.token
    }

    pub(super) fn capture(&self) -> &Arc<Capture> {
        &self.capture
    }

    /// Sends it until it is over or not wanted any more.
    pub(super) async fn send(self, mut client: DataplaneServiceClient<Channel>) {
        // However this ends, the guest's driver copies nothing any more.
        let _stopped = Stopped(Arc::clone(&self.capture));
        let (messages, outgoing) = mpsc::channel(MESSAGES);
        let produce = std::pin::pin!(self.produce(messages));
        let mut call = std::pin::pin!(client.send_capture(ReceiverStream::new(outgoing)));
        let answer = tokio::select! {
            () = produce => match tokio::time::timeout(PATIENCE, call).await {
                Ok(answer) => answer,
                Err(_) => return,
            },
            answer = &mut call => answer,
        };
        if let Err(status) = answer {
            tracing::debug!(why = status.message(), "a capture is not taken any more");
        }
    }

    async fn produce(&self, messages: mpsc::Sender<v1::SendCaptureRequest>) {
        let until = self
            .duration
            .and_then(|length| Instant::now().checked_add(length));
        let mut token = self.token.to_vec();
        loop {
            if until.is_some_and(|until| until <= Instant::now()) {
                self.capture.stop(CaptureEnd::Duration);
            }
            let is_first = !token.is_empty();
            let (packets, end) = self.batch();
            if is_first || !packets.is_empty() || end.is_some() {
                let message = v1::SendCaptureRequest {
                    token: std::mem::take(&mut token),
                    packets,
                    dropped: self.dropped(),
                    end: end.map_or(v1::CaptureEnd::Unspecified, Into::into).into(),
                };
                if messages.send(message).await.is_err() || end.is_some() {
                    return;
                }
            }
            if self.capture.may_sleep() {
                let timeout = async {
                    match until {
                        Some(until) => tokio::time::sleep_until(until).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = self.woken.notified() => {}
                    () = timeout => {}
                }
            }
        }
    }

    /// What is to be sent next, and the end if that is all.
    fn batch(&self) -> (Vec<v1::CapturedPacket>, Option<CaptureEnd>) {
        // Before the queue is looked at: nothing is put into it any more once this is set.
        let end = self.capture.end();
        let (mut packets, mut bytes) = (Vec::new(), 0);
        while packets.len() < BATCH_PACKETS && bytes < BATCH_BYTES {
            let Some(packet) = self.capture.take() else {
                return (packets, end);
            };
            bytes += packet.data.len();
            packets.push(packet.into());
        }
        (packets, None)
    }

    fn dropped(&self) -> u64 {
        let interfaces = self.capture.interfaces_from(0);
        interfaces.iter().map(|interface| interface.counts().1).sum()
    }
}

/// Stops a capture when it is let go of.
struct Stopped(Arc<Capture>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.stop(CaptureEnd::Stopped);
        while self.0.take().is_some() {}
    }
}

/// Reads a token.
pub(super) fn token(bytes: &[u8]) -> Result<Token, Refusal> {
    bytes
        .try_into()
        .map_err(|_| Refusal::invalid(format!("token is {} bytes long (expected 16)", bytes.len())))
}

impl From<Packet> for v1::CapturedPacket {
    fn from(packet: Packet) -> Self {
        Self {
            time: Some(Timestamp {
                seconds: i64::try_from(packet.at_ns / NANOSECONDS).unwrap_or(i64::MAX),
                nanos: (packet.at_ns % NANOSECONDS) as i32,
            }),
            data: packet.data.into(),
            original_length: packet.original_length,
            from_guest: packet.direction == Direction::Outbound,
        }
    }
}

impl From<CaptureEnd> for v1::CaptureEnd {
    fn from(end: CaptureEnd) -> Self {
        match end {
            CaptureEnd::Stopped => Self::Stopped,
            CaptureEnd::Packets => Self::Packets,
            CaptureEnd::Duration => Self::Duration,
            CaptureEnd::GuestGone => Self::VmGone,
        }
    }
}
