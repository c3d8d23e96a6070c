//! Captures on their way from a dataplane to who asked for them. Nothing is kept of them.
//!
//! A table beside the hub's state and with a lock of its own: packets wait for nothing else, and nothing else for
//! them. A capture is known by a token that only the dataplane was told which was asked; from it a bounded queue of
//! messages leads to the client. What finds the queue full is dropped and counted, so that a client which does not
//! read never keeps the dataplane's stream from being read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use vnet_proto::model::{CAPTURE_SNAP_BYTES_MAX, CaptureFilter};
use vnet_proto::v1;
use vnet_proto::v1::command::Command;

use super::{Hub, State};
use crate::fleet::DataplaneNo;
use crate::refusal::Refusal;

/// Captures at once, of all dataplanes.
pub const CAPTURES_MAX: usize = 32;
/// Messages that wait for one client.
const QUEUE_MAX: usize = 8;
/// Bytes of packets that one message may have.
pub(crate) const MESSAGE_PACKETS_BYTES_MAX: usize = 1 << 20;
/// Packets that one message may have.
pub(crate) const MESSAGE_PACKETS_MAX: usize = 4_096;
/// The longest that a capture may be asked to take.
const DURATION_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What both sides of a session know a capture by.
type Token = [u8; 16];

/// The captures that are under way.
#[derive(Debug, Default)]
pub(super) struct Captures(Mutex<HashMap<Token, Entry>>);

#[derive(Debug)]
struct Entry {
    dataplane: DataplaneNo,
    /// Taken by the stream that brings the packets, which may be one.
    sender: Option<mpsc::Sender<v1::CaptureVmResponse>>,
}

impl Captures {
    fn lock(&self) -> MutexGuard<'_, HashMap<Token, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A dataplane's session is over, and its captures with it.
    pub(super) fn end_of(&self, dataplane: DataplaneNo) {
        self.lock().retain(|_, entry| entry.dataplane != dataplane);
    }

    /// The controlplane ends.
    pub(super) fn close(&self) {
        self.lock().clear();
    }
}

/// What a client is sent.
#[derive(Debug)]
pub(crate) struct CaptureStream {
    messages: mpsc::Receiver<v1::CaptureVmResponse>,
    /// Ends the capture when the client is gone.
    _guard: Guard,
}

impl CaptureStream {
    /// The next message; `None` when the dataplane was lost.
    pub(crate) async fn next(&mut self) -> Option<v1::CaptureVmResponse> {
        self.messages.recv().await
    }
}

#[derive(Debug)]
struct Guard {
    hub: Arc<Hub>,
    token: Token,
    dataplane: DataplaneNo,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.hub.captures.lock().remove(&self.token);
        let stop = Command::StopCapture(v1::StopCapture {
            token: self.token.to_vec(),
        });
        // Nobody waits for the acknowledgement; a dataplane that is lost has stopped.
        let _ = self
            .hub
            .read(|state, _| state.send_command(self.dataplane, None, |_| stop));
    }
}

/// Where a dataplane's packets go.
#[derive(Debug)]
pub(crate) struct CaptureSink {
    sender: mpsc::Sender<v1::CaptureVmResponse>,
    /// Packets that the client was too slow for.
    lost: u64,
}

impl CaptureSink {
    /// Hands a message on, or counts its packets as lost. True when it was the last. How many were lost now.
    pub(crate) async fn put(&mut self, message: v1::SendCaptureRequest) -> (bool, u64) {
        let is_last = message.end != i32::from(v1::CaptureEnd::Unspecified);
        let count = message.packets.len() as u64;
        let response = v1::CaptureVmResponse {
            packets: message.packets,
            dropped: message.dropped.saturating_add(self.lost),
            end: message.end,
        };
        if is_last {
            // There is nothing behind it that would have to be read meanwhile.
            let _ = self.sender.send(response).await;
            return (true, 0);
        }
        match self.sender.try_send(response) {
            Ok(()) => (false, 0),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.lost += count;
                (false, count)
            }
            Err(mpsc::error::TrySendError::Closed(_)) => (false, 0),
        }
    }

    /// Returns when the client is gone.
    pub(crate) async fn closed(&self) {
        self.sender.closed().await;
    }
}

impl Hub {
    /// Begins a capture at the dataplane that has the VM.
    ///
    /// # Errors
    /// [`Refusal`] of what is asked for, of the dataplane, and at a limit.
    pub(crate) async fn capture(
        self: &Arc<Self>,
        request: v1::CaptureVmRequest,
    ) -> Result<CaptureStream, Refusal> {
        check(&request)?;
        let name = self.vm(&request.vm)?.name;
        let mut token = Token::default();
        getrandom::fill(&mut token).map_err(|e| Refusal::Unavailable(format!("no randomness: {e}")))?;
        let (sender, messages) = mpsc::channel(QUEUE_MAX);
        let (dataplane, handle) = self.read(|state, _| state.capturable(&name))?;
        {
            let mut captures = self.captures.lock();
            if captures.len() >= CAPTURES_MAX {
                return Err(Refusal::Limit(format!(
                    "there are {CAPTURES_MAX} captures already; end one of them"
                )));
            }
            let sender = Some(sender);
            captures.insert(token, Entry { dataplane, sender });
        }
        let guard = Guard {
            hub: Arc::clone(self),
            token,
            dataplane,
        };
        let start = Command::StartCapture(v1::StartCapture {
            token: token.to_vec(),
            vm: handle,
            filter: request.filter,
            snap_length: request.snap_length,
            max_packets: request.max_packets,
            duration: request.duration,
        });
        self.command_to(dataplane, start).await?;
        Ok(CaptureStream {
            messages,
            _guard: guard,
        })
    }

    /// Where the packets of a capture go that was asked of a dataplane; once.
    pub(crate) fn capture_sink(&self, token: &[u8]) -> Option<CaptureSink> {
        let token: Token = token.try_into().ok()?;
        let sender = self.captures.lock().get_mut(&token)?.sender.take()?;
        Some(CaptureSink { sender, lost: 0 })
    }
}

fn check(request: &v1::CaptureVmRequest) -> Result<(), Refusal> {
    let filter = request.filter.parse::<CaptureFilter>();
    filter.map_err(|error| Refusal::field("filter", error.to_string()))?;
    if request.snap_length > CAPTURE_SNAP_BYTES_MAX {
        let text = format!(
            "{} is too much (expected at most {CAPTURE_SNAP_BYTES_MAX})",
            request.snap_length
        );
        return Err(Refusal::field("snap_length", text));
    }
    if let Some(duration) = request.duration {
        let length = Duration::try_from(duration).ok();
        if length.is_none_or(|length| length.is_zero() || length > DURATION_MAX) {
            return Err(Refusal::field(
                "duration",
                "expected more than nothing and at most a week",
            ));
        }
    }
    Ok(())
}

impl State {
    /// The dataplane that has a VM, and its handle there.
    fn capturable(&self, name: &str) -> Result<(DataplaneNo, u32), Refusal> {
        let vm = self.fleet.vm(name)?;
        if vm.lost {
            return Err(Refusal::Unavailable(format!(
                "the dataplane of VM {name} is lost"
            )));
        }
        Ok((vm.dataplane, vm.handle.0))
    }
}
