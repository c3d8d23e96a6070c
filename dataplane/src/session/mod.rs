//! The session, dataplane side: one stream to the controlplane, and what outlives it.
//!
//! [`run`] dials, says Hello, carries misses and reports out and verdicts and commands in, and begins
//! anew when the stream ends. What it means is in `conversation`, which has no I/O; what a reconnect
//! must repeat is in `mirror`; both are driven from here. Whose flows these are and how verdicts are
//! kept is the engine's; this module gives orders and never sees a frame.
//!
//! Without a controlplane nothing opens: misses stay with their guests until their deadline, and cached
//! verdicts end with the leases that only a heartbeat renews.
//!
//! Source: the conversation above `Session` in `vnet/v1/dataplane.proto`.

mod backoff;
mod capture;
mod commands;
mod conversation;
mod dial;
mod mirror;
#[cfg(test)]
mod tests;
mod wire;

use std::error::Error;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::{Ipv4Net, Ipv6Net};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use vnet_proto::v1;
use vnet_proto::v1::dataplane_service_client::DataplaneServiceClient;

use crate::causes::WithCauses;
use crate::guards::Guards;
use crate::message::{Report, Router};
use crate::metrics::{Metrics, SessionEndCause};
use backoff::Backoff;
use conversation::{Broken, Conversation};
use dial::{DialError, Dialler};

pub use commands::{Captures, Commands, Refusal, Zones};
pub use dial::Controlplane;

/// Who this dataplane is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its name, unique among the dataplanes of a controlplane.
    pub dataplane: String,
    /// Random, new for each start of the process.
    pub boot_id: [u8; 16],
    /// The network's name.
    pub network: String,
    /// The guest subnet.
    pub subnet: Ipv4Net,
    /// The guests' IPv6 prefix.
    pub subnet_ipv6: Option<Ipv6Net>,
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// The address that is dialled as the host's loopback.
    pub host_alias: Option<Ipv4Addr>,
    /// Other destinations that are dialled at other addresses.
    pub nat: Vec<(Ipv4Addr, IpAddr)>,
}

/// What a session needs.
pub struct SessionConfig {
    /// Where the controlplane is.
    pub controlplane: Controlplane,
    /// Who this is.
    pub identity: Identity,
    /// The guards in force; told where the controlplane listens.
    pub guards: Arc<Guards>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

/// Why [`run`] returned.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// Every sender of reports is gone: the dataplane ends, and all was said that could be.
    #[error("the dataplane ended")]
    Finished,
    /// The controlplane refuses this dataplane; trying again would change nothing.
    #[error("the controlplane refuses this dataplane: {text}")]
    Refused {
        /// What kind of refusal.
        code: Code,
        /// What it says.
        text: String,
    },
    /// The inherited stream to the controlplane ended, and there is no other.
    #[error("the stream to the controlplane ended: {text}")]
    StreamEnded {
        /// How.
        text: String,
    },
}

/// Carries the session until [`Report::End`] or the last sender of `reports` is gone, or the controlplane
/// refuses.
///
/// The channel of `reports` is bounded by the caller. It is read at all times but when the controlplane
/// does not read in turn; then drivers keep what they have to say.
pub async fn run(
    config: SessionConfig,
    reports: mpsc::Receiver<Report>,
    router: Arc<dyn Router>,
    commands: Commands,
) -> SessionEnd {
    let SessionConfig {
        controlplane,
        identity,
        guards,
        metrics,
    } = config;
    let conversation = Conversation::new(
        identity,
        router,
        commands,
        guards,
        Arc::clone(&metrics),
        mirror::Limits::default(),
    );
    let runner = Runner {
        conversation,
        reports: Reports {
            receiver: reports,
            ending: None,
            finished: false,
        },
        metrics,
    };
    runner.run(Dialler::new(controlplane)).await
}

struct Runner {
    conversation: Conversation,
    reports: Reports,
    metrics: Arc<Metrics>,
}

struct Reports {
    receiver: mpsc::Receiver<Report>,
    /// Guests are given until then to say that they are gone.
    ending: Option<Instant>,
    /// Nothing more will be reported.
    finished: bool,
}

/// How one stream, or the attempt at one, ended.
enum Ended {
    Finished,
    Refused(Status),
    Broken(Broken),
    Closed(Option<Status>),
    Unreachable(DialError),
}

impl Runner {
    async fn run(mut self, mut dialler: Dialler) -> SessionEnd {
        let mut backoff = Backoff::new();
        let mut unreachable_since: Option<Instant> = None;
        loop {
            let was_welcomed = self.metrics.session_welcomes.get();
            let ended = self.attempt(&mut dialler).await;
            self.conversation.lost();
            if self.metrics.session_welcomes.get() != was_welcomed {
                backoff.reset();
            }
            let cause = ended.cause();
            if let Some(cause) = cause {
                self.metrics.session_ends.of(cause).increment();
            }
            let text = match ended {
                Ended::Finished => return SessionEnd::Finished,
                Ended::Refused(status) => {
                    return SessionEnd::Refused {
                        code: status.code(),
                        text: status.message().to_owned(),
                    };
                }
                ended => ended.text(),
            };
            if !dialler.can_dial() {
                return SessionEnd::StreamEnded { text };
            }
            // Attempts come often; only the first of a row is worth a line.
            if cause == Some(SessionEndCause::Unreachable) && unreachable_since.is_some() {
                tracing::debug!(why = text, "the controlplane is still out of reach");
            } else {
                tracing::warn!(
                    why = text,
                    "no session; nothing new is let out until the controlplane is back"
                );
            }
            unreachable_since = (cause == Some(SessionEndCause::Unreachable))
                .then(|| unreachable_since.unwrap_or_else(Instant::now));
            // Without randomness every dataplane would come back at the same moment; that is all.
            let pause = backoff.next(getrandom::u32().unwrap_or(u32::MAX));
            if self.meanwhile(tokio::time::sleep(pause)).await.is_none() {
                return SessionEnd::Finished;
            }
        }
    }

    /// One stream from dialling to its end.
    async fn attempt(&mut self, dialler: &mut Dialler) -> Ended {
        let channel = match self.meanwhile(dialler.dial()).await {
            None => return Ended::Finished,
            Some(Err(error)) => return Ended::Unreachable(error),
            Some(Ok(channel)) => channel,
        };
        let (requests, outgoing) = mpsc::channel(STREAM_QUEUE);
        let hello = self.conversation.hello(Instant::now());
        self.metrics.messages_sent.increment();
        // The queue is new and has room.
        if requests.try_send(hello).is_err() {
            return Ended::Closed(None);
        }
        let mut client = DataplaneServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let captures = client.clone();
        let calling = client.session(ReceiverStream::new(outgoing));
        let inbound = match self.greeted(calling).await {
            Ok(response) => response.into_inner(),
            Err(ended) => return ended,
        };
        self.converse(requests, inbound, captures).await
    }

    /// Waits for the controlplane to take the call, within the time for a Welcome.
    async fn greeted<T>(&mut self, calling: impl Future<Output = Result<T, Status>>) -> Result<T, Ended> {
        let deadline = self.conversation.poll_timeout().unwrap_or_else(Instant::now);
        match self
            .meanwhile(tokio::time::timeout_at(deadline.into(), calling))
            .await
        {
            None => Err(Ended::Finished),
            Some(Err(_)) => Err(Ended::Broken(Broken::NoWelcome)),
            Some(Ok(Err(status))) => Err(self.ended(status)),
            Some(Ok(Ok(taken))) => Ok(taken),
        }
    }

    async fn converse(
        &mut self,
        requests: mpsc::Sender<v1::SessionRequest>,
        mut inbound: Streaming<v1::SessionResponse>,
        client: DataplaneServiceClient<Channel>,
    ) -> Ended {
        // They end with the session.
        let mut captures = JoinSet::new();
        let mut batch = Vec::with_capacity(REPORTS_BATCH);
        loop {
            self.flush(&requests);
            if self.reports.finished && !self.conversation.has_transmit() {
                // Who looks on is told that the guests are gone.
                let told = async { while captures.join_next().await.is_some() {} };
                let _ = tokio::time::timeout(CAPTURES_PATIENCE, told).await;
                return take_leave(requests, inbound).await;
            }
            let deadline = self.conversation.poll_timeout().unwrap_or_else(Instant::now);
            let takes_reports = self.conversation.accepts_reports() && !self.reports.finished;
            let done = tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(message)) => self.conversation.handle_response(message, Instant::now()),
                    Ok(None) => return Ended::Closed(None),
                    Err(status) => return self.ended(status),
                },
                count = self.reports.receiver.recv_many(&mut batch, REPORTS_BATCH), if takes_reports => {
                    self.take_reports(count, &mut batch);
                    Ok(())
                }
                room = requests.reserve(), if self.conversation.has_transmit() => {
                    match (room, self.conversation.poll_transmit()) {
                        (Ok(room), Some(message)) => {
                            self.metrics.messages_sent.increment();
                            room.send(message);
                        }
                        (Ok(_), None) => {}
                        // The other end stopped reading; how, the inbound side says.
                        (Err(_), _) => return self.last_words(inbound).await,
                    }
                    Ok(())
                }
                Some(_) = captures.join_next(), if !captures.is_empty() => Ok(()),
                () = until(self.reports.ending), if !self.reports.finished => {
                    self.reports.finished = true;
                    Ok(())
                }
                () = tokio::time::sleep_until(deadline.into()) => {
                    self.conversation.handle_timeout(Instant::now())
                }
            };
            self.conversation.publish();
            for asked in self.conversation.take_captures() {
                captures.spawn(asked.send(client.clone()));
            }
            if let Err(broken) = done {
                return Ended::Broken(broken);
            }
        }
    }

    /// Moves as many messages to the stream as it takes without waiting.
    fn flush(&mut self, requests: &mpsc::Sender<v1::SessionRequest>) {
        while self.conversation.has_transmit() {
            let Ok(room) = requests.try_reserve() else { return };
            if let Some(message) = self.conversation.poll_transmit() {
                self.metrics.messages_sent.increment();
                room.send(message);
            }
        }
    }

    async fn last_words(&self, mut inbound: Streaming<v1::SessionResponse>) -> Ended {
        match tokio::time::timeout(LEAVE_PATIENCE, inbound.message()).await {
            Ok(Err(status)) => self.ended(status),
            Ok(Ok(_)) | Err(_) => Ended::Closed(None),
        }
    }

    /// Awaits something while reports are taken into the mirror. `None` when the last sender is gone.
    async fn meanwhile<F: Future>(&mut self, awaited: F) -> Option<F::Output> {
        let mut awaited = std::pin::pin!(awaited);
        let mut batch = Vec::with_capacity(REPORTS_BATCH);
        loop {
            if self.reports.finished {
                return None;
            }
            tokio::select! {
                output = &mut awaited => return Some(output),
                count = self.reports.receiver.recv_many(&mut batch, REPORTS_BATCH),
                    if self.conversation.accepts_reports() => {
                        self.take_reports(count, &mut batch);
                        self.conversation.publish();
                    }
                () = until(self.reports.ending) => self.reports.finished = true,
            }
        }
    }

    fn take_reports(&mut self, count: usize, batch: &mut Vec<Report>) {
        if count == 0 {
            self.reports.finished = true;
        }
        let now = Instant::now();
        for report in batch.drain(..) {
            if matches!(report, Report::End) {
                self.reports.ending = Some(now + LEAVE_PATIENCE);
            }
            self.conversation.handle_report(report, now);
        }
        if self.reports.ending.is_some() && self.conversation.has_no_guests() {
            self.reports.finished = true;
        }
    }

    /// What a stream's status means. Before Welcome it may be a refusal.
    fn ended(&self, status: Status) -> Ended {
        let refused = match status.code() {
            Code::InvalidArgument | Code::FailedPrecondition => true,
            // Another dataplane has the name, or this one was not yet noticed to be gone.
            Code::AlreadyExists => !self.conversation.was_welcomed(),
            // Something answers there, but not to dataplanes, or not to this one.
            Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => {
                !self.conversation.was_welcomed()
            }
            _ => false,
        };
        if refused && !self.conversation.is_open() {
            Ended::Refused(status)
        } else {
            Ended::Closed(Some(status))
        }
    }
}

/// Returns at a moment, if there is one.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Ends the stream in order: no more requests, and what the controlplane has to say is let pass.
async fn take_leave(
    requests: mpsc::Sender<v1::SessionRequest>,
    mut inbound: Streaming<v1::SessionResponse>,
) -> Ended {
    drop(requests);
    let silence = async { while let Ok(Some(_)) = inbound.message().await {} };
    // However it ends, the dataplane is going.
    let _ = tokio::time::timeout(LEAVE_PATIENCE, silence).await;
    Ended::Finished
}

impl Ended {
    fn cause(&self) -> Option<SessionEndCause> {
        Some(match self {
            Self::Finished => return None,
            Self::Refused(_) => SessionEndCause::Refused,
            Self::Broken(Broken::Silent(_)) => SessionEndCause::Silent,
            Self::Broken(Broken::NoWelcome) | Self::Unreachable(_) => SessionEndCause::Unreachable,
            Self::Broken(_) => SessionEndCause::Violation,
            Self::Closed(_) => SessionEndCause::Lost,
        })
    }

    fn text(&self) -> String {
        let error: &dyn Error = match self {
            Self::Finished => return "finished".to_owned(),
            Self::Closed(None) => return "the controlplane closed the stream".to_owned(),
            Self::Refused(status) | Self::Closed(Some(status)) => {
                return format!("{}: {}", status.code(), status.message());
            }
            Self::Broken(broken) => broken,
            Self::Unreachable(error) => error,
        };
        WithCauses(error).to_string()
    }
}

/// Reports taken at one wake-up.
const REPORTS_BATCH: usize = 256;
/// Messages between the conversation and the stream's encoder.
const STREAM_QUEUE: usize = 1024;
/// The longest message taken from the controlplane, in bytes.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// How long the last packets of captures may take.
const CAPTURES_PATIENCE: Duration = Duration::from_millis(200);
/// How long the end of a stream may take.
const LEAVE_PATIENCE: Duration = Duration::from_millis(500);
