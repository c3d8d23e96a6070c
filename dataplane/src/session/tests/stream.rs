//! The session over a real Unix socket, against a controlplane that the test plays.

use std::path::PathBuf;

use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response as Answer, Status, Streaming};
use v1::dataplane_service_server::{DataplaneService, DataplaneServiceServer};
use v1::session_request::Message;

use super::*;
use crate::message::MissEnd;
use crate::metrics::SessionEndCause;
use crate::session::{Controlplane, SessionConfig, SessionEnd, run};

/// One stream, as the controlplane sees it.
pub(super) struct Stream {
    requests: Streaming<v1::SessionRequest>,
    pub(super) responses: mpsc::Sender<Result<v1::SessionResponse, Status>>,
}

/// The packets of one capture, as the controlplane sees them.
pub(super) struct Captured {
    pub(super) requests: Streaming<v1::SendCaptureRequest>,
    /// The controlplane wants no more.
    pub(super) answer: super::capture::Answer,
}

impl Stream {
    pub(super) async fn next(&mut self) -> Option<Message> {
        let next = tokio::time::timeout(PATIENCE, self.requests.message())
            .await
            .expect("a message in time");
        next.ok().flatten().and_then(|request| request.message)
    }

    pub(super) async fn hello(&mut self) -> v1::Hello {
        match self.next().await {
            Some(Message::Hello(hello)) => hello,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn say(&self, response: v1::SessionResponse) {
        self.responses.send(Ok(response)).await.unwrap();
    }

    pub(super) async fn welcome(&self, epoch: Epoch) {
        self.say(welcome(epoch, Duration::from_secs(5))).await;
    }
}

struct Sessions(mpsc::Sender<Stream>, mpsc::Sender<Captured>);

#[tonic::async_trait]
impl DataplaneService for Sessions {
    type SessionStream = ReceiverStream<Result<v1::SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Answer<Self::SessionStream>, Status> {
        let (responses, outgoing) = mpsc::channel(64);
        let stream = Stream {
            requests: request.into_inner(),
            responses,
        };
        self.0
            .send(stream)
            .await
            .map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Answer::new(ReceiverStream::new(outgoing)))
    }

    async fn send_capture(
        &self,
        request: Request<Streaming<v1::SendCaptureRequest>>,
    ) -> Result<Answer<v1::SendCaptureResponse>, Status> {
        let (answer, answered) = oneshot::channel();
        let requests = request.into_inner();
        let captured = Captured { requests, answer };
        self.1
            .send(captured)
            .await
            .map_err(|_| Status::unavailable("the test is over"))?;
        // A test that lets go of it answers too.
        let _ = answered.await;
        Ok(Answer::new(v1::SendCaptureResponse {}))
    }
}

pub(super) struct Fake {
    pub(super) path: PathBuf,
    streams: mpsc::Receiver<Stream>,
    captures: mpsc::Receiver<Captured>,
    server: JoinHandle<()>,
}

impl Fake {
    pub(super) fn path() -> PathBuf {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        std::env::temp_dir().join(format!("vnet-session-{}-{next}.sock", std::process::id()))
    }

    pub(super) fn listen(path: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        Self::serve(path, UnixListenerStream::new(listener))
    }

    fn serve<S>(path: PathBuf, incoming: S) -> Self
    where
        S: tokio_stream::Stream<Item = std::io::Result<tokio::net::UnixStream>> + Send + 'static,
    {
        let (sender, streams) = mpsc::channel(4);
        let (captured, captures) = mpsc::channel(4);
        let service = DataplaneServiceServer::new(Sessions(sender, captured));
        let server = tokio::spawn(async move {
            // It ends with the test, by whatever end.
            let _ = tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await;
        });
        Self {
            path,
            streams,
            captures,
            server,
        }
    }

    pub(super) async fn capture(&mut self) -> Captured {
        tokio::time::timeout(PATIENCE, self.captures.recv())
            .await
            .expect("a capture in time")
            .unwrap()
    }

    pub(super) async fn accept(&mut self) -> Stream {
        tokio::time::timeout(PATIENCE, self.streams.recv())
            .await
            .expect("a stream in time")
            .unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
        // The file may be gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

pub(super) struct Dataplane {
    pub(super) captures: Arc<CaptureList>,
    reports: mpsc::Sender<Report>,
    router: Arc<Recorder>,
    metrics: Arc<Metrics>,
    session: JoinHandle<SessionEnd>,
}

pub(super) fn start(controlplane: Controlplane) -> Dataplane {
    let (reports, receiver) = mpsc::channel(64);
    let (router, metrics) = (Recorder::with(&[1]), Arc::<Metrics>::default());
    let config = SessionConfig {
        controlplane,
        identity: identity(),
        guards: guards(),
        metrics: Arc::clone(&metrics),
    };
    let captures = Arc::<CaptureList>::default();
    let commands = Commands {
        captures: Arc::clone(&captures) as Arc<dyn Captures>,
        ..commands(&router, &metrics)
    };
    let session = tokio::spawn(run(
        config,
        receiver,
        Arc::clone(&router) as Arc<dyn Router>,
        commands,
    ));
    Dataplane {
        captures,
        reports,
        router,
        metrics,
        session,
    }
}

impl Dataplane {
    async fn ended(self) -> SessionEnd {
        tokio::time::timeout(PATIENCE, self.session)
            .await
            .expect("an end in time")
            .unwrap()
    }
}

#[tokio::test]
async fn a_miss_goes_out_and_its_verdict_comes_back() {
    let mut controlplane = Fake::listen(Fake::path());
    let dataplane = start(Controlplane::Unix(controlplane.path.clone()));
    let mut stream = controlplane.accept().await;
    assert_eq!(stream.hello().await.dataplane, "dp");
    dataplane.reports.send(vm_up(1)).await.unwrap();
    dataplane.reports.send(miss(1, 1)).await.unwrap();
    stream.welcome(epoch(1)).await;

    assert!(matches!(stream.next().await, Some(Message::VmUp(_))));
    assert!(matches!(stream.next().await, Some(Message::Miss(_))));
    stream
        .say(response(Response::Verdict(verdict(1, 1, epoch(1)))))
        .await;

    dataplane
        .router
        .wait_for(|order| matches!(order, Order::Verdict(_)))
        .await;
    assert_eq!(dataplane.metrics.session_up.get(), 1);
}

#[tokio::test]
async fn after_a_lost_stream_the_dataplane_comes_back_and_asks_again() {
    let mut controlplane = Fake::listen(Fake::path());
    let dataplane = start(Controlplane::Unix(controlplane.path.clone()));
    let mut stream = controlplane.accept().await;
    let first = stream.hello().await;
    stream.welcome(epoch(1)).await;
    for report in [vm_up(1), miss(1, 1), flow(1, 1)] {
        dataplane.reports.send(report).await.unwrap();
        stream.next().await.unwrap();
    }
    // UNAVAILABLE is no refusal.
    stream
        .responses
        .send(Err(Status::unavailable("going down")))
        .await
        .unwrap();
    drop(stream);

    let mut stream = controlplane.accept().await;
    let again = stream.hello().await;
    assert_eq!(again.boot_id, first.boot_id);
    assert_eq!((again.vms.len(), again.live_flows.len()), (1, 1));
    stream
        .welcome(Epoch {
            incarnation: 3,
            counter: 1,
        })
        .await;
    let Some(Message::Miss(asked)) = stream.next().await else {
        panic!()
    };
    assert_eq!(asked.miss_id, miss_id(VmId(1), 1).0);
    dataplane
        .router
        .wait_for(|o| matches!(o, Order::Revoke { epoch, .. } if epoch.incarnation == 3))
        .await;
    assert_eq!(dataplane.metrics.session_ends.of(SessionEndCause::Lost).get(), 1);
    assert_eq!(dataplane.metrics.session_welcomes.get(), 2);
}

#[tokio::test]
async fn a_controlplane_that_comes_late_is_found() {
    let path = Fake::path();
    let dataplane = start(Controlplane::Unix(path.clone()));
    // Reports are taken meanwhile, more of them than the channel holds.
    for sequence in 0..200 {
        dataplane.reports.send(miss(1, sequence)).await.unwrap();
    }
    while dataplane
        .metrics
        .session_ends
        .of(SessionEndCause::Unreachable)
        .get()
        == 0
    {
        tokio::task::yield_now().await;
    }
    let mut controlplane = Fake::listen(path);
    let mut stream = controlplane.accept().await;
    stream.hello().await;
    stream.welcome(epoch(1)).await;
    for _ in 0..200 {
        assert!(matches!(stream.next().await, Some(Message::Miss(_))));
    }
}

#[tokio::test]
async fn a_refused_hello_ends_the_dataplane_with_the_text() {
    for status in [
        Status::invalid_argument("own policy p.yaml:3:5: unknown key"),
        Status::failed_precondition("protocol version 1 is too old"),
        Status::already_exists("another dataplane is named dp"),
    ] {
        let mut controlplane = Fake::listen(Fake::path());
        let dataplane = start(Controlplane::Unix(controlplane.path.clone()));
        let mut stream = controlplane.accept().await;
        stream.hello().await;
        stream.responses.send(Err(status.clone())).await.unwrap();

        let ended = dataplane.ended().await;
        let SessionEnd::Refused { code, text } = &ended else {
            panic!("{ended:?}")
        };
        assert_eq!((*code, text.as_str()), (status.code(), status.message()));
    }
}

#[tokio::test]
async fn a_silent_controlplane_is_left_and_tried_again() {
    let mut controlplane = Fake::listen(Fake::path());
    let dataplane = start(Controlplane::Unix(controlplane.path.clone()));
    let mut stream = controlplane.accept().await;
    stream.hello().await;
    stream.say(welcome(epoch(1), Duration::from_millis(20))).await;

    // It hears our heartbeats and says nothing.
    let mut again = controlplane.accept().await;
    again.hello().await;
    assert_eq!(
        dataplane.metrics.session_ends.of(SessionEndCause::Silent).get(),
        1
    );
    assert!(matches!(stream.next().await, Some(Message::Heartbeat(_))));
}

#[tokio::test]
async fn an_inherited_stream_is_used_once() {
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    there.set_nonblocking(true).unwrap();
    let there = tokio::net::UnixStream::from_std(there).unwrap();
    let (connections, incoming) = mpsc::channel(1);
    connections.send(Ok(there)).await.unwrap();
    let mut controlplane = Fake::serve(Fake::path(), ReceiverStream::new(incoming));

    let dataplane = start(Controlplane::Inherited(here));
    let mut stream = controlplane.accept().await;
    stream.hello().await;
    stream.welcome(epoch(1)).await;
    dataplane
        .router
        .wait_for(|order| matches!(order, Order::Lease { .. }))
        .await;
    drop(stream);

    let ended = dataplane.ended().await;
    assert!(matches!(ended, SessionEnd::StreamEnded { .. }), "{ended:?}");
}

#[tokio::test]
async fn at_its_end_the_dataplane_says_what_is_left_to_say() {
    let mut controlplane = Fake::listen(Fake::path());
    let dataplane = start(Controlplane::Unix(controlplane.path.clone()));
    let mut stream = controlplane.accept().await;
    stream.hello().await;
    stream.welcome(epoch(1)).await;
    dataplane.reports.send(vm_up(1)).await.unwrap();
    assert!(matches!(stream.next().await, Some(Message::VmUp(_))));

    let Dataplane { reports, session, .. } = dataplane;
    let end = MissEnd::VmDown;
    // Guests end a little later than they are told to.
    reports.send(Report::End).await.unwrap();
    reports
        .send(Report::MissEnded {
            miss: miss_id(VmId(1), 1),
            end,
        })
        .await
        .unwrap();
    reports.send(super::down(1)).await.unwrap();

    assert!(matches!(stream.next().await, Some(Message::MissEnded(_))));
    assert!(matches!(stream.next().await, Some(Message::VmDown(_))));
    assert!(stream.next().await.is_none(), "the stream is ended in order");
    drop(stream);
    let ended = tokio::time::timeout(PATIENCE, session).await.unwrap().unwrap();
    assert!(matches!(ended, SessionEnd::Finished), "{ended:?}");
}

#[tokio::test]
async fn twenty_thousand_misses_and_verdicts_pass() {
    const MISSES: u64 = 20_000;
    let mut controlplane = Fake::listen(Fake::path());
    let dataplane = start(Controlplane::Unix(controlplane.path.clone()));
    let mut stream = controlplane.accept().await;
    stream.hello().await;
    stream.welcome(epoch(1)).await;
    let reports = dataplane.reports.clone();
    let began = Instant::now();
    tokio::spawn(async move {
        for sequence in 0..MISSES {
            reports.send(miss(1, sequence)).await.unwrap();
        }
    });
    for _ in 0..MISSES {
        let Some(Message::Miss(asked)) = stream.next().await else {
            panic!()
        };
        let sequence = asked.miss_id & ((1 << crate::message::SEQUENCE_BITS) - 1);
        stream
            .say(response(Response::Verdict(verdict(1, sequence, epoch(1)))))
            .await;
    }
    while dataplane.metrics.verdicts.get() < MISSES {
        assert!(
            began.elapsed() < PATIENCE * 3,
            "{} verdicts",
            dataplane.metrics.verdicts.get()
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!(
        "{:.0} misses answered a second",
        MISSES as f64 / began.elapsed().as_secs_f64()
    );
    assert_eq!(dataplane.metrics.held_misses.get(), 0);
}

#[tokio::test]
async fn a_guest_that_does_not_end_holds_nothing_up() {
    // There is no controlplane either.
    let dataplane = start(Controlplane::Unix(Fake::path()));
    dataplane.reports.send(vm_up(1)).await.unwrap();
    dataplane.reports.send(Report::End).await.unwrap();
    let ended = dataplane.ended().await;
    assert!(matches!(ended, SessionEnd::Finished), "{ended:?}");
}
