//! The connection to a controlplane: where it is, how long an answer may take, whose it is.
//!
//! Without `--server` it is the user's own, and a command that needs it starts it (`launch`). With
//! `--server` nothing is started: whoever named a server means that one.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, http};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;
use vnet_proto::v1;

use crate::failure::Failure;
use crate::output::text::safe;

/// Where a controlplane answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.starts_with('/') {
                Ok(Self::Unix(PathBuf::from(path)))
            } else {
                Err(format!(
                    "{text:?} has no absolute path (expected one as unix:///run/user/1000/vnet/control.sock)"
                ))
            };
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        match text.split_once("://").map(|(scheme, _)| scheme) {
            Some(scheme @ ("https" | "tcp" | "http")) => Err(format!(
                "{scheme}:// controlplanes cannot be reached yet (expected unix:///PATH, on this machine)"
            )),
            _ => Err(format!(
                "{text:?} is not a controlplane's address (expected unix:///PATH)"
            )),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing listens there.
    #[error("no controlplane answers at {server}")]
    Absent {
        /// Where it was looked for.
        server: Server,
    },
    /// Something is in the way.
    #[error("cannot connect to the controlplane at {server}: {source}")]
    Refused {
        /// Where.
        server: Server,
        /// What is in the way.
        source: io::Error,
    },
    /// Something listens there that does not answer as a controlplane does.
    #[error("{}", .0.whole())]
    NoAnswer(NoAnswer),
}

/// A connected client of every service that people use.
#[derive(Debug, Clone)]
pub struct Client {
    wire: Wire,
}

/// One generated client.
macro_rules! service {
    ($($(#[$doc:meta])* $name:ident: $module:ident::$client:ident;)*) => {
        impl Client {$(
            $(#[$doc])*
            pub fn $name(&self) -> v1::$module::$client<Wire> {
                v1::$module::$client::new(self.wire.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
            }
        )*}
    };
}

service! {
    /// Policies.
    policy: policy_service_client::PolicyServiceClient;
    /// Pending requests.
    pending: pending_service_client::PendingServiceClient;
    /// Grants.
    grants: grant_service_client::GrantServiceClient;
    /// VMs.
    vms: vm_service_client::VmServiceClient;
    /// Flows.
    flows: flow_service_client::FlowServiceClient;
    /// Forwards.
    forwards: forward_service_client::ForwardServiceClient;
    /// DNS.
    dns: dns_service_client::DnsServiceClient;
    /// Events.
    events: event_service_client::EventServiceClient;
}

/// The way to a controlplane. What fails on it says which, and what to look at.
#[derive(Debug, Clone)]
pub struct Wire {
    channel: Channel,
    server: Server,
}

/// No answer came from a controlplane.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct NoAnswer {
    what: String,
    /// What to look at, a line each.
    remedies: Vec<String>,
}

impl NoAnswer {
    /// What it says, and what to look at, for a terminal.
    pub fn whole(&self) -> String {
        let lines = std::iter::once(&self.what).chain(&self.remedies);
        lines.map(|line| safe(line)).collect::<Vec<_>>().join("\n  ")
    }

    fn new(server: &Server, error: &(dyn std::error::Error + 'static)) -> Self {
        let Server::Unix(path) = server;
        let causes = std::iter::successors(Some(error), |error| error.source());
        let mut last = String::new();
        let mut in_time = true;
        for cause in causes {
            in_time &= !cause.is::<tonic::TimeoutExpired>();
            last = cause.to_string();
        }
        if in_time {
            return Self {
                what: format!("what answers at {server} is no controlplane, or has just ended ({last})"),
                remedies: vec![
                    format!("see who listens there: ss -xlp src {}", path.display()),
                    "of a controlplane's sockets, control.sock is the one for this".to_owned(),
                ],
            };
        }
        Self::silent(server)
    }

    /// What holds the socket takes connections, if anything, and says nothing.
    fn silent(server: &Server) -> Self {
        let Server::Unix(path) = server;
        let mut remedies = vec![format!(
            "it may be stopped (state T in ps) or too busy; see who listens there: ss -xlp src {}",
            path.display()
        )];
        if crate::launch::own_server().is_ok_and(|own| own == *server)
            && let Some(log) = crate::launch::own_log()
        {
            remedies.push(format!("its log: {}", log.display()));
        }
        Self {
            what: format!("the controlplane at {server} does not answer"),
            remedies,
        }
    }
}

impl tower::Service<http::Request<Body>> for Wire {
    type Response = http::Response<Body>;
    type Error = NoAnswer;
    type Future = BoxFuture<Self::Response, NoAnswer>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), NoAnswer>> {
        let server = &self.server;
        self.channel
            .poll_ready(context)
            .map_err(|error| NoAnswer::new(server, &error))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let server = self.server.clone();
        let answer = self.channel.call(request);
        let silence = silence(self.channel.clone());
        Box::pin(async move {
            tokio::select! {
                answer = answer => answer.map_err(|error| NoAnswer::new(&server, &error)),
                () = silence => Err(NoAnswer::silent(&server)),
            }
        })
    }
}

/// Ends when a call has had no answer for a while and the controlplane answers nothing else either. An answer may take
/// as long as it must (a person is asked, every dataplane has to acknowledge) while the controlplane lives.
async fn silence(channel: Channel) {
    let mut vms = v1::vm_service_client::VmServiceClient::new(channel);
    loop {
        tokio::time::sleep(SILENCE).await;
        // What it refuses is an answer.
        if tokio::time::timeout(PROBE_PATIENCE, vms.list_vms(next_to_nothing()))
            .await
            .is_err()
        {
            return;
        }
    }
}

impl Client {
    /// Connects, or says that nothing answers.
    ///
    /// # Errors
    /// [`ConnectError::Absent`] when nobody listens, [`ConnectError::Refused`] for anything else.
    pub async fn connect(server: &Server) -> Result<Self, ConnectError> {
        let Server::Unix(path) = server;
        // Asked first by hand: the transport's own errors do not tell absence from refusal.
        if let Err(source) = UnixStream::connect(path).await {
            return Err(match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ConnectError::Absent {
                    server: server.clone(),
                },
                _ => ConnectError::Refused {
                    server: server.clone(),
                    source,
                },
            });
        }
        let path = path.clone();
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The authority is never resolved; the connector above dials the socket.
        let channel = Endpoint::from_static("http://controlplane.vnet.internal")
            .connect_timeout(CONNECT_PATIENCE)
            .connect_with_connector(connector)
            .await
            .map_err(|error| ConnectError::NoAnswer(NoAnswer::new(server, &error)))?;
        let server = server.clone();
        Ok(Self {
            wire: Wire { channel, server },
        })
    }

    /// Whether it answers: not merely accepts, but serves.
    pub async fn answers(&self) -> bool {
        self.probe().await.is_ok()
    }

    /// Asks for next to nothing, and not for long.
    ///
    /// # Errors
    /// What it refuses, or that it does not answer.
    pub async fn probe(&self) -> Result<(), tonic::Status> {
        self.vms()
            .list_vms(with_patience(next_to_nothing(), READY_PATIENCE))
            .await
            .map(drop)
    }
}

/// A question whose answer says no more than that there is one.
fn next_to_nothing() -> v1::ListVmsRequest {
    v1::ListVmsRequest {
        page_size: 1,
        ..Default::default()
    }
}

/// Set in the environment of a command under `run`. It decides nothing: it only words an error.
pub const INSIDE_RUN: &str = "VNET_RUN";

const NOT_INSIDE: &str = "this is inside a vnetctl run, from which no controlplane can be reached; use a terminal \
                          outside of it";

/// A failure to reach a controlplane, as it is told to who is inside a run.
fn from_inside(failure: Failure, is_inside: bool) -> Failure {
    match failure {
        Failure::Failed(text) if is_inside => Failure::Failed(format!("{NOT_INSIDE}\n  {text}")),
        other => other,
    }
}

/// What a command must know to find its controlplane.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The one that was named, if one was.
    pub named: Option<Server>,
}

impl Connection {
    /// Where it is.
    ///
    /// # Errors
    /// When the user's own place for sockets cannot be used.
    pub fn server(&self) -> Result<Server, Failure> {
        match &self.named {
            Some(server) => Ok(server.clone()),
            None => crate::launch::own_server(),
        }
    }

    /// Connects. The user's own controlplane is started if it does not answer.
    ///
    /// # Errors
    /// When the named one does not answer, or the user's own cannot be started.
    pub async fn open(&self) -> Result<Client, Failure> {
        let is_inside = std::env::var_os(INSIDE_RUN).is_some();
        self.connect()
            .await
            .map_err(|failure| from_inside(failure, is_inside))
    }

    async fn connect(&self) -> Result<Client, Failure> {
        let server = self.server()?;
        match (Client::connect(&server).await, &self.named) {
            (Ok(client), _) => Ok(client),
            (Err(ConnectError::Absent { .. }), None) => crate::launch::controlplane(&server).await,
            (Err(error @ ConnectError::Absent { .. }), Some(Server::Unix(path))) => Err(Failure::Failed(
                format!("{}\n  {}", safe(&error.to_string()), how_to_start(path)),
            )),
            (Err(ConnectError::NoAnswer(none)), _) => Err(Failure::Failed(none.whole())),
            (Err(error), _) => Err(Failure::Failed(safe(&error.to_string()).into_owned())),
        }
    }
}

fn how_to_start(path: &Path) -> String {
    let path = path.display();
    format!(
        "start one with: vnet-controlplane --listen unix://{path}\n  \
         or name none: your own is used then, and started when needed"
    )
}

/// A request that is given up after `UNARY_PATIENCE`.
pub fn unary<T>(message: T) -> tonic::Request<T> {
    with_patience(message, UNARY_PATIENCE)
}

/// A request that reads the whole history, or asks every dataplane, and may take minutes.
pub fn unhurried<T>(message: T) -> tonic::Request<T> {
    with_patience(message, UNHURRIED_PATIENCE)
}

/// A request that a person may have to answer: it is the controlplane that ends the wait, by its policy.
pub fn asking<T>(message: T) -> tonic::Request<T> {
    with_patience(message, ASKING_PATIENCE)
}

fn with_patience<T>(message: T, patience: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(patience);
    request
}

/// Reads every page of a list, at most [`LIST_ITEMS_MAX`] items.
///
/// # Errors
/// The first refusal; or more items than the limit, rather than a list that looks whole.
pub async fn pages<T, F, Fut>(mut page: F) -> Result<Vec<T>, Failure>
where
    F: FnMut(String) -> Fut,
    Fut: Future<Output = Result<(Vec<T>, String), tonic::Status>>,
{
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let (items, next) = page(token).await?;
        all.extend(items);
        if next.is_empty() {
            return Ok(all);
        }
        if all.len() >= LIST_ITEMS_MAX {
            return Err(Failure::Failed(format!(
                "there are more than {LIST_ITEMS_MAX} entries; narrow the list with --vm or -l"
            )));
        }
        token = next;
    }
}

/// The size of the pages that lists are read in; the most that the contract allows.
pub const PAGE_SIZE: u32 = 1000;
/// The most entries a list prints.
pub const LIST_ITEMS_MAX: usize = 100_000;
/// How long a call has no answer before the controlplane is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(2);
/// How long an answer may take. A change waits for dataplanes to acknowledge, so it is not short.
const UNARY_PATIENCE: Duration = Duration::from_secs(30);
const UNHURRIED_PATIENCE: Duration = Duration::from_secs(600);
/// Beyond the longest `approvalTimeout`.
const ASKING_PATIENCE: Duration = Duration::from_secs(3600 + 60);
/// One that is being started is asked again; one that is not ready is told of.
const READY_PATIENCE: Duration = Duration::from_secs(2);
/// What answers nothing at all for this long is stopped, or as good as that.
const PROBE_PATIENCE: Duration = Duration::from_secs(4);
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// A page of the largest messages fits (a pending request with its names is under 16 KiB).
const MESSAGE_BYTES_MAX: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::cmd::tests::scripted::Scripted;

    /// A socket of a test's own, served by `serve`.
    fn served<F: Future<Output = ()> + Send>(
        name: &str,
        serve: impl Fn(UnixStream) -> F + Send + 'static,
    ) -> (Server, impl Drop) {
        struct Gone(PathBuf, tokio::task::JoinHandle<()>);
        impl Drop for Gone {
            fn drop(&mut self) {
                self.1.abort();
                let _ = std::fs::remove_file(&self.0);
            }
        }
        let path = std::env::temp_dir().join(format!("vnetctl-{name}-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream).await;
            }
        });
        (Server::Unix(path.clone()), Gone(path, task))
    }

    #[tokio::test]
    async fn one_that_hangs_is_named_with_what_to_look_at() {
        let (server, _gone) = served("hangs", |stream| async move {
            let _held = stream;
            std::future::pending().await
        });
        let client = Client::connect(&server).await.unwrap();
        let request = with_patience(v1::ListVmsRequest::default(), Duration::from_millis(1));

        let failure = Failure::from(client.vms().list_vms(request).await.unwrap_err());

        let text = failure.to_string();
        assert!(
            text.starts_with(&format!("the controlplane at {server} does not answer\n")),
            "{text}"
        );
        assert!(text.contains("ss -xlp src "), "{text}");
        assert_eq!(failure.exit_code(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_answers_nothing_at_all_is_given_up_long_before_an_answer_is_due() {
        let (server, _gone) = served("silent", |stream| async move {
            let _held = stream;
            std::future::pending().await
        });
        let client = Client::connect(&server).await.unwrap();
        let began = tokio::time::Instant::now();

        let answer = client
            .pending()
            .approve(asking(v1::ApproveRequest::default()))
            .await;

        let text = Failure::from(answer.unwrap_err()).to_string();
        assert!(text.contains("does not answer\n"), "{text}");
        assert_eq!(began.elapsed().as_secs(), (SILENCE + PROBE_PATIENCE).as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn who_answers_others_may_take_as_long_as_it_must() {
        let server = Scripted::start();
        server.answer("PendingService/Approve", &v1::ApproveResponse::default());
        server.takes("PendingService/Approve", Duration::from_secs(600));
        let client = server.connection().open().await.unwrap();

        let answer = client
            .pending()
            .approve(asking(v1::ApproveRequest::default()))
            .await;

        answer.unwrap();
        // What it refuses is an answer, and it is asked no oftener than it is silent.
        let probes: Vec<v1::ListVmsRequest> = server.asked("VmService/ListVms");
        assert!((250..=300).contains(&probes.len()), "{}", probes.len());
    }

    #[tokio::test]
    async fn a_socket_that_is_no_controlplanes_is_named_as_such() {
        let (server, _gone) = served("other", |mut stream| async move {
            let _ = stream.write_all(b"220 mail.example ESMTP\r\n").await;
        });
        let answer = async {
            let client = Client::connect(&server).await.map_err(|e| e.to_string())?;
            let request = unary(v1::ListVmsRequest::default());
            let answer = client.vms().list_vms(request).await;
            Ok(answer
                .map(drop)
                .map_err(|status| crate::failure::describe(&status)))
        };

        let text = match answer.await {
            Ok(answer) => answer.unwrap_err(),
            Err(text) => text,
        };

        assert!(text.contains(&server.to_string()), "{text}");
        assert!(
            text.contains("no controlplane") && text.contains("control.sock"),
            "{text}"
        );
    }

    #[test]
    fn who_is_inside_a_run_is_told_so_first() {
        let failed = || Failure::Failed("/tmp/vnet-7 has mode 0555".to_owned());
        let inside = from_inside(failed(), true).to_string();
        assert!(inside.starts_with("this is inside a vnetctl run"), "{inside}");
        assert!(inside.ends_with("/tmp/vnet-7 has mode 0555"), "{inside}");
        assert_eq!(from_inside(failed(), false).to_string(), failed().to_string());
    }

    #[test]
    fn servers_are_unix_sockets_with_absolute_paths() {
        let unix = |path: &str| Ok(Server::Unix(PathBuf::from(path)));

        assert_eq!("unix:///run/x.sock".parse(), unix("/run/x.sock"));
        assert_eq!("/run/x.sock".parse(), unix("/run/x.sock"));
        for (text, part) in [
            ("unix://x.sock", "no absolute path"),
            ("https://cp.example:7443", "cannot be reached yet"),
            ("tcp://127.0.0.1:1", "cannot be reached yet"),
            ("x.sock", "not a controlplane's address"),
        ] {
            let error = text.parse::<Server>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[tokio::test]
    async fn a_named_server_that_is_absent_is_an_error_that_says_how_to_start_one() {
        let connection = Connection {
            named: Some(Server::Unix(PathBuf::from("/nonexistent/vnet.sock"))),
        };

        let error = connection.open().await.unwrap_err();

        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        assert!(
            text.contains("no controlplane answers at unix:///nonexistent/vnet.sock"),
            "{text}"
        );
        assert!(text.contains("vnet-controlplane --listen"), "{text}");
    }

    #[tokio::test]
    async fn an_endless_list_is_refused_at_the_limit() {
        let result = pages(|_| async { Ok((vec![0u8; 1000], "more".to_owned())) }).await;

        assert!(result.unwrap_err().to_string().contains("more than 100000"));
    }
}
