//! `/network/events`: server-sent events, in the draft's words, for as long as their reader stays.
//!
//! The first is `init`, with every connection that is known. Each event has the network and the sequence number of the
//! controlplane's for its id, so that a reader that comes back with `Last-Event-ID` goes on where it was, also after a
//! restart of the controlplane. After one of gvproxy the network is another, whose events do not end what the reader
//! knows: it is told of a `gap`, and begins anew. What a reader was too slow for, or is not kept any more, is a `gap`,
//! too. A comment every [`KEEP_ALIVE`] keeps what is between from thinking that nobody is there.
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>)

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::StatusCode;
use hyper::body::Frame;
use hyper::header::{HeaderName, HeaderValue};
use serde::Serialize;
use tokio::sync::mpsc;
use tonic::Code;
use vnet_proto::v1;

use super::answer::{Answer, Body, is_away};
use super::control::CallError;
use super::network::{APPROVED, DENIED, Domain, PENDING, allowed_name, granted, of_event, when};
use super::{EVENT_STREAMS_MAX, Services, json};
use crate::client::unary;

/// Where a reader goes on.
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// How often something is sent, at least.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long until a controlplane that went away is looked for again.
const RETRY: Duration = Duration::from_secs(1);
/// Events that wait for a reader here; what is beyond them waits in the controlplane, which tells of a gap.
const WAITING_MAX: usize = 64;

impl Services {
    /// Begins a stream.
    pub(super) async fn events(self: &Arc<Self>, last: Option<&HeaderValue>) -> Result<Answer, Answer> {
        let permit = Arc::clone(&self.event_streams).try_acquire_owned().map_err(|_| {
            let text = format!("{EVENT_STREAMS_MAX} streams of events are open already");
            Answer::error(StatusCode::SERVICE_UNAVAILABLE, text).with_remedy("close one first")
        })?;
        let network = self.control.network();
        let after = last.and_then(|last| number(network, last.to_str().ok()?));
        let (out, events) = mpsc::channel(WAITING_MAX);
        let mut stream = Stream {
            services: Arc::clone(self),
            out,
            after,
        };
        if last.is_some() && after.is_none() {
            // There is room for it, and the reader is there.
            let _ = stream.send("gap", &Gap { missed: 0 }).await;
        }
        // Whether there will be any is told by the response's status.
        if after.is_none() {
            stream.begin().await?;
        }
        let first = match stream.open().await {
            Err(CallError::Refused(status)) if status.code() == Code::InvalidArgument => None,
            opened => Some(opened?),
        };
        tokio::spawn(async move {
            stream.run(first).await;
            drop(permit);
        });
        Ok(Answer::events(body(events)))
    }
}

/// An event's id.
fn id(network: &str, number: u64) -> String {
    format!("{network}:{number}")
}

/// The number in an id that [`id`] made of this network; none in any other, as what it stands for is nowhere here.
fn number(network: &str, id: &str) -> Option<u64> {
    let (of, number) = id.trim().rsplit_once(':')?;
    number.parse().ok().filter(|_| of == network)
}

/// Events as a body, with a comment where nothing happens.
fn body(events: mpsc::Receiver<String>) -> Body {
    let frames = futures_util::stream::unfold(events, |mut events| async {
        let text = match tokio::time::timeout(KEEP_ALIVE, events.recv()).await {
            Ok(Some(text)) => text,
            Ok(None) => return None,
            Err(_) => ": keep-alive\n\n".to_owned(),
        };
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(text))), events))
    });
    StreamBody::new(frames).boxed_unsync()
}

/// Events as the controlplane sends them.
type Watch = tonic::Streaming<v1::WatchEventsResponse>;

/// Why there is no next event for now.
enum Ended {
    /// The reader is gone.
    Reader,
    /// The controlplane is, or it cannot go on from where the reader is.
    Watch,
}

struct Stream {
    services: Arc<Services>,
    out: mpsc::Sender<String>,
    /// The last event that was sent, or passed over; `None` where the reader has to be told everything.
    after: Option<u64>,
}

impl Stream {
    /// Passes events on until the reader is gone. `first` is the watch that is open already; none where it could not
    /// go on from where the reader is.
    async fn run(&mut self, first: Option<Watch>) {
        let mut ended = match first {
            Some(watch) => self.pass(watch).await,
            None => self.start_over().await,
        };
        while let Ended::Watch = ended {
            tokio::select! {
                () = self.out.closed() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
            ended = self.watch().await;
        }
    }

    /// Sends every connection that is known, and goes on from now.
    async fn begin(&mut self) -> Result<(), Answer> {
        let request = v1::ListEventsRequest {
            page_size: 1,
            ..Default::default()
        };
        // The number first: what happens while the list is made is sent after it.
        let newest = self
            .services
            .control
            .call(|client| async move { client.events().list_events(unary(request)).await })
            .await?;
        let last = newest.events.first().map_or(0, |event| event.sequence);
        let connections = self.services.connections().await?;
        self.after = Some(last);
        // Nobody to hear it is found out when the next is sent.
        let _ = self.send("init", &connections).await;
        Ok(())
    }

    async fn watch(&mut self) -> Ended {
        if self.after.is_none() && self.begin().await.is_err() {
            return Ended::Watch;
        }
        match self.open().await {
            Ok(watch) => self.pass(watch).await,
            Err(CallError::Refused(status)) if status.code() == Code::InvalidArgument => {
                self.start_over().await
            }
            Err(_) => Ended::Watch,
        }
    }

    async fn open(&self) -> Result<Watch, CallError> {
        let request = v1::WatchEventsRequest {
            kinds: KINDS.map(i32::from).to_vec(),
            after_sequence: self.after,
            network: self.services.control.network().to_owned(),
            ..Default::default()
        };
        self.services
            .control
            .call(|client| async move { client.events().watch_events(request).await })
            .await
    }

    async fn pass(&mut self, mut events: Watch) -> Ended {
        loop {
            let next = tokio::select! {
                () = self.out.closed() => return Ended::Reader,
                next = events.message() => next,
            };
            let event = match next {
                Ok(Some(v1::WatchEventsResponse { event: Some(event) })) => event,
                Ok(Some(_)) => continue,
                Err(status) if status.code() == Code::InvalidArgument => return self.start_over().await,
                Ok(None) | Err(_) => return Ended::Watch,
            };
            if let Err(ended) = self.pass_on(event).await {
                return ended;
            }
        }
    }

    /// The reader is somewhere that this history has never been: it lost its past, and begins anew.
    async fn start_over(&mut self) -> Ended {
        self.after = None;
        match self.send("gap", &Gap { missed: 0 }).await {
            Ok(()) => Ended::Watch,
            Err(ended) => ended,
        }
    }

    async fn pass_on(&mut self, event: v1::Event) -> Result<(), Ended> {
        match event.kind() {
            v1::EventKind::Gap => return self.send("gap", &Gap { missed: event.missed }).await,
            v1::EventKind::HistoryCutOff => {
                self.after = Some(event.sequence);
                return self.send("gap", &Gap { missed: 0 }).await;
            }
            _ => {}
        }
        let told = match event.kind() {
            v1::EventKind::PendingClosed if event.action() == v1::Action::Unspecified => {
                let state = self.state_of(&event.subject).await?;
                closed_unanswered(&event, state)
            }
            _ => tell(&event),
        };
        self.after = Some(event.sequence);
        match told {
            Some(Told::Connection(name, connection)) => self.send(name, &connection).await,
            Some(Told::Domain(name, domain)) => self.send(name, &domain).await,
            Some(Told::Allowed(domain)) => self.send("dns_allowed", &Allowed { domain }).await,
            None => Ok(()),
        }
    }

    async fn state_of(&self, id: &str) -> Result<v1::PendingState, Ended> {
        let request = v1::GetPendingRequest { id: id.to_owned() };
        let found = self
            .services
            .control
            .call(|client| async move { client.pending().get_pending(unary(request)).await })
            .await;
        match found {
            Ok(found) => Ok(found.request.unwrap_or_default().state()),
            Err(CallError::Refused(status)) if !is_away(&status) => Ok(v1::PendingState::Expired),
            Err(_) => Err(Ended::Watch),
        }
    }

    async fn send(&self, name: &str, data: &impl Serialize) -> Result<(), Ended> {
        let id = match (name, self.after) {
            // A gap is nowhere.
            ("gap", _) | (_, None) => String::new(),
            (_, Some(last)) => format!("id: {}\n", id(self.services.control.network(), last)),
        };
        let text = format!("{id}event: {name}\ndata: {}\n\n", json::line(data));
        self.out.send(text).await.map_err(|_| Ended::Reader)
    }
}

#[derive(Serialize)]
struct Gap {
    missed: u64,
}

#[derive(Serialize)]
struct Allowed {
    domain: String,
}

/// An event in the draft's words.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Connection(&'static str, super::network::Connection),
    Domain(&'static str, Domain),
    Allowed(String),
}

/// What is watched.
const KINDS: [v1::EventKind; 6] = [
    v1::EventKind::PendingOpened,
    v1::EventKind::PendingClosed,
    v1::EventKind::FlowDenied,
    v1::EventKind::DnsDenied,
    v1::EventKind::GrantCreated,
    v1::EventKind::HistoryCutOff,
];

fn tell(event: &v1::Event) -> Option<Told> {
    let is_lookup = !event.query_type.is_empty();
    let connection = |name, status| of_event(event, status).map(|one| Told::Connection(name, one));
    let domain = |name| domain(event).map(|one| Told::Domain(name, one));
    match (event.kind(), event.action()) {
        (v1::EventKind::PendingOpened, _) if is_lookup => domain("dns_pending"),
        (v1::EventKind::PendingOpened, _) => connection("network_pending", PENDING),
        // The grant that answered it tells that.
        (v1::EventKind::PendingClosed, v1::Action::Allow) if is_lookup => None,
        (v1::EventKind::PendingClosed, v1::Action::Allow) => connection("network_approved", APPROVED),
        (v1::EventKind::PendingClosed, _) if is_lookup => domain("dns_denied"),
        (v1::EventKind::PendingClosed, _) => connection("network_denied", DENIED),
        (v1::EventKind::FlowDenied, _) => connection("network_denied", DENIED),
        (v1::EventKind::DnsDenied, _) => domain("dns_denied"),
        (v1::EventKind::GrantCreated, _) => {
            let grant = event.grant.as_ref()?;
            if let Some(name) = allowed_name(grant) {
                return Some(Told::Allowed(name.to_owned()));
            }
            // What answered a request is told of with that.
            let made = granted(grant).filter(|_| grant.pending_id.is_empty())?;
            let name = if made.status == APPROVED {
                "network_approved"
            } else {
                "network_denied"
            };
            Some(Told::Connection(name, made))
        }
        _ => None,
    }
}

/// A request that nobody answered. Where a change of the policy decided it, what that decided is told by what follows.
fn closed_unanswered(event: &v1::Event, state: v1::PendingState) -> Option<Told> {
    match state {
        v1::PendingState::Decided => None,
        _ => tell(event),
    }
}

fn domain(event: &v1::Event) -> Option<Domain> {
    let at = when(event.time.as_ref());
    Some(Domain {
        domain: event.names.first()?.clone(),
        count: event.count.max(1),
        first_seen: at.clone(),
        last_seen: at,
    })
}

#[cfg(test)]
mod tests {
    use hyper::Response;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::gvproxy::services::serve::http;

    #[test]
    fn a_request_that_ended_unanswered_was_not_let_through_unless_a_policy_decided_it() {
        let event = |query_type: &str| v1::Event {
            kind: v1::EventKind::PendingClosed.into(),
            query_type: query_type.to_owned(),
            names: vec!["example.com".to_owned()],
            tuple: Some(v1::FlowTuple {
                protocol: v1::Protocol::Tcp.into(),
                address: "198.18.0.1".to_owned(),
                port: 443,
                ..Default::default()
            }),
            guards: vec![v1::Guard::Synthetic.into()],
            ..Default::default()
        };
        assert_eq!(closed_unanswered(&event(""), v1::PendingState::Decided), None);
        let Some(Told::Connection("network_denied", connection)) =
            closed_unanswered(&event(""), v1::PendingState::Expired)
        else {
            panic!()
        };
        assert_eq!(connection.ip, "example.com", "a synthetic address says nothing");
        assert!(matches!(
            closed_unanswered(&event("A"), v1::PendingState::Cancelled),
            Some(Told::Domain("dns_denied", _))
        ));
    }

    /// Three days in driven time.
    #[tokio::test(start_paused = true)]
    async fn a_stream_is_open_for_days() {
        const DAYS: Duration = Duration::from_secs(3 * 24 * 60 * 60);
        let (out, events) = mpsc::channel(WAITING_MAX);
        let (mut reader, server) = tokio::io::duplex(1024);
        let events = std::sync::Mutex::new(Some(events));
        let service = service_fn(move |_| {
            let events = events.lock().unwrap().take().expect("one request");
            async move { Ok::<_, Infallible>(Response::new(body(events))) }
        });
        tokio::spawn(http().serve_connection(TokioIo::new(server), service));
        reader
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let reading = tokio::spawn(async move {
            let mut said = Vec::new();
            while !said.ends_with(b"event: last\n\n\r\n") {
                assert_ne!(reader.read_buf(&mut said).await.unwrap(), 0, "it ended");
            }
            String::from_utf8(said).unwrap()
        });

        tokio::time::sleep(DAYS).await;
        out.send("event: last\n\n".to_owned()).await.unwrap();
        let said = reading.await.unwrap();

        let expected = DAYS.as_secs() / KEEP_ALIVE.as_secs();
        let told = said.matches(": keep-alive").count() as u64;
        assert!(told.abs_diff(expected) <= 1, "{told} of {expected}");
    }
}
