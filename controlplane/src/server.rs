//! The running controlplane: store, hub, listeners and signals put together, and taken down in order.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::transport::Server;
use vnet_proto::v1::dataplane_service_server::DataplaneServiceServer;
use vnet_proto::v1::dns_service_server::DnsServiceServer;
use vnet_proto::v1::event_service_server::EventServiceServer;
use vnet_proto::v1::flow_service_server::FlowServiceServer;
use vnet_proto::v1::forward_service_server::ForwardServiceServer;
use vnet_proto::v1::grant_service_server::GrantServiceServer;
use vnet_proto::v1::pending_service_server::PendingServiceServer;
use vnet_proto::v1::policy_service_server::PolicyServiceServer;
use vnet_proto::v1::vm_service_server::VmServiceServer;

use crate::api::Api;
use crate::clock::Clock;
use crate::config::{Config, Endpoint};
use crate::hub::{Candidate, DEFAULT, Hub};
use crate::listener::{Attached, ListenError, Listener, SocketLock, answers};
use crate::lists::{self, PACKED_BYTES_MAX};
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::session::{NoSessions, Sessions};
use crate::store::{self, StoreError, Writer};

/// The API's services, as reflection and health name them.
pub const API_SERVICES: [&str; 8] = [
    "vnet.v1.DnsService",
    "vnet.v1.EventService",
    "vnet.v1.FlowService",
    "vnet.v1.ForwardService",
    "vnet.v1.GrantService",
    "vnet.v1.PendingService",
    "vnet.v1.PolicyService",
    "vnet.v1.VmService",
];

/// How often the hub looks at the clock.
const TICK: Duration = Duration::from_millis(200);
/// How long open calls have to end when the controlplane does.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a controlplane that is starting or ending beside this one has to do so.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// The largest message of a client: a policy document and what goes with it.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Bytes that a message may have which carries a policy: its document, and its lists.
const POLICY_MESSAGE_BYTES_MAX: usize = PACKED_BYTES_MAX + MESSAGE_BYTES_MAX;

/// Why the controlplane ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The store.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A listener.
    #[error("{0}")]
    Listen(#[from] ListenError),
    /// A policy file.
    #[error("policy file {file} cannot be read")]
    PolicyFile {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A policy document.
    #[error("{0}")]
    Policy(#[from] Refusal),
    /// A list that the policy file names will not do.
    #[error(transparent)]
    List(#[from] lists::ListError),
    /// Serving.
    #[error("the API cannot be served")]
    Serve(#[from] tonic::transport::Error),
    /// The descriptors of the contract.
    #[error("the contract's descriptors do not load")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The system.
    #[error("signals cannot be handled")]
    Signals(#[source] std::io::Error),
}

/// How a controlplane ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By a signal.
    Stopped,
    /// Nothing was attached for long enough.
    Idle,
    /// Another one serves already, and that was to be.
    AlreadyServed,
}

/// Runs a controlplane until a signal or idleness ends it.
///
/// # Errors
/// [`RunError`] if it cannot start, or a listener fails.
pub async fn run(config: Config) -> Result<Ended, RunError> {
    let Some(locks) = take_locks(&config).await? else {
        return Ok(Ended::AlreadyServed);
    };
    let metrics = Arc::new(Metrics::default());
    let attached = Attached::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(RunError::Signals)?;

    let hub = Arc::new(open_hub(&config, &metrics)?);
    if let Some(file) = &config.network_policy {
        load_policy_file(&hub, file)?;
    }
    let bind = |endpoints: &[Endpoint]| -> Result<Vec<Listener>, ListenError> {
        endpoints
            .iter()
            .map(|e| Listener::bind(e, &attached, &metrics))
            .collect()
    };
    let sessions = bind(&config.session_listen)?;
    let api = bind(&config.listen)?;
    let (stop, stopped) = watch::channel(false);
    let mut servers = tokio::task::JoinSet::new();
    for listener in sessions {
        servers.spawn(serve_sessions(Arc::clone(&hub), listener, stopped.clone()));
    }
    for listener in api {
        servers.spawn(serve_api(Arc::clone(&hub), listener, stopped.clone()));
    }
    for endpoint in &config.listen {
        tracing::info!(%endpoint, "serving the API");
    }
    let idle = idle(attached.clone(), config.idle_exit);
    tokio::pin!(idle);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);

    let ended = loop {
        tokio::select! {
            _ = tick.tick() => hub.tick(),
            _ = terminate.recv() => break Ok(Ended::Stopped),
            _ = interrupt.recv() => break Ok(Ended::Stopped),
            _ = hangup.recv() => reload(&hub, config.network_policy.as_deref()),
            () = &mut idle => break Ok(Ended::Idle),
            Some(result) = servers.join_next() => match result {
                Ok(Ok(())) => break Ok(Ended::Stopped),
                Ok(Err(e)) => break Err(e),
                Err(e) => tracing::error!(error = %e, "a listener's task ended"),
            },
        }
    };
    // Sockets go first, so that whoever comes now starts a controlplane of its own (which waits for the
    // locks); then the calls.
    for endpoint in config.listen.iter().chain(&config.session_listen) {
        if let Endpoint::Unix(path) = endpoint {
            let _ = std::fs::remove_file(path);
        }
    }
    stop.send_replace(true);
    hub.close();
    let drained = async { while servers.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        servers.shutdown().await;
    }
    for (name, value) in metrics.all() {
        tracing::debug!(name, value, "counted");
    }
    // Sessions' tasks end by themselves; the last to go waits for what is still to be written.
    let alone = async {
        while Arc::strong_count(&hub) > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = tokio::time::timeout(DRAIN, alone).await;
    drop(hub);
    drop(locks);
    ended
}

/// Takes the locks of all sockets; `None`: another controlplane serves, and that was to be.
async fn take_locks(config: &Config) -> Result<Option<Vec<SocketLock>>, RunError> {
    let mut paths: Vec<&Path> = config
        .listen
        .iter()
        .chain(&config.session_listen)
        .filter_map(|e| {
            if let Endpoint::Unix(path) = e {
                Some(path.as_path())
            } else {
                None
            }
        })
        .collect();
    // In one order everywhere, so that two that start at once do not each hold half.
    paths.sort();
    paths.dedup();
    let give_up = tokio::time::Instant::now() + LOCK_WAIT;
    let mut locks = Vec::new();
    for path in paths {
        loop {
            if let Some(lock) = SocketLock::try_take(path)? {
                locks.push(lock);
                break;
            }
            // The holder serves, is about to, or is about to end: then the lock comes free.
            let serves = config.listen.iter().all(|e| {
                if let Endpoint::Unix(path) = e {
                    answers(path)
                } else {
                    true
                }
            });
            if config.if_absent && serves {
                return Ok(None);
            }
            if serves || tokio::time::Instant::now() >= give_up {
                return Err(ListenError::InUse(path.to_owned()).into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(Some(locks))
}

fn open_hub(config: &Config, metrics: &Arc<Metrics>) -> Result<Hub, RunError> {
    let mut state = store::open(&config.store)?;
    let mut history = config.history.as_ref().map(store::open).transpose()?;
    if let Some(serves) = config.listen.first().map(ToString::to_string) {
        for store in std::iter::once(&mut state).chain(&mut history) {
            store.sign(&serves);
        }
    }
    let snapshot = state.load()?;
    let opened = match &mut history {
        Some(history) => history.open_history()?,
        None => state.open_history()?,
    };
    let writer = Writer::start(state, history, Arc::clone(metrics))?;
    let clock = Clock::system();
    Ok(Hub::new(
        snapshot,
        opened,
        writer,
        clock,
        Arc::clone(metrics),
        config.secure_mode,
    )?)
}

/// Applies a policy file to `default`, unless it is what is in force.
fn load_policy_file(hub: &Hub, file: &Path) -> Result<(), RunError> {
    let source = file.display().to_string();
    let document = std::fs::read_to_string(file).map_err(|e| RunError::PolicyFile {
        file: source.clone(),
        source: e,
    })?;
    let in_force = hub.policy(DEFAULT)?;
    let beside = file.parent().unwrap_or(Path::new("."));
    let lists = lists::read(&document, beside)?;
    let same_lists = in_force.lists == lists::described(&lists);
    if in_force.revision != 0 && in_force.document == document && same_lists {
        return Ok(());
    }
    let applied = hub.apply_policy(Candidate {
        name: DEFAULT,
        document: &document,
        source: &source,
        etag: "",
        actor: "--network-policy",
        validate_only: false,
        lists: &lists,
        confirm_within: None,
    })?;
    for warning in applied.warnings {
        tracing::warn!(file = source, line = warning.line, text = warning.text, "policy");
    }
    tracing::info!(
        file = source,
        revision = applied.policy.revision,
        "policy in force"
    );
    Ok(())
}

fn reload(hub: &Hub, file: Option<&Path>) {
    let Some(file) = file else { return };
    if let Err(e) = load_policy_file(hub, file) {
        let cause = std::error::Error::source(&e)
            .map(ToString::to_string)
            .unwrap_or_default();
        tracing::error!(error = %e, cause, "policy file refused; the policy in force stays");
    }
}

/// Ends when nothing was attached for so long; never without a limit.
async fn idle(attached: Attached, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    let mut count = attached.subscribe();
    loop {
        let is_idle = *count.borrow_and_update() == 0;
        if !is_idle {
            if count.changed().await.is_err() {
                return;
            }
        } else if tokio::time::timeout(limit, count.changed()).await.is_err() {
            return;
        }
    }
}

/// Serves dataplanes, and nothing else, until told to stop.
///
/// # Errors
/// [`RunError::Serve`].
pub async fn serve_sessions(
    hub: Arc<Hub>,
    listener: Listener,
    stopped: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let service =
        DataplaneServiceServer::new(Sessions::new(hub)).max_decoding_message_size(MESSAGE_BYTES_MAX * 4);
    let server = Server::builder().add_service(service);
    Ok(server
        .serve_with_incoming_shutdown(listener, until(stopped))
        .await?)
}

/// Serves everything but sessions, with reflection and health, until told to stop.
///
/// # Errors
/// [`RunError`].
pub async fn serve_api(
    hub: Arc<Hub>,
    listener: Listener,
    stopped: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let api = Api::new(hub);
    let (health, health_service) = tonic_health::server::health_reporter();
    for service in API_SERVICES.into_iter().chain([""]) {
        health
            .set_service_status(service, tonic_health::ServingStatus::Serving)
            .await;
    }
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(vnet_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        // Sessions have a listener of their own, so they are not listed here.
        API_SERVICES
            .into_iter()
            .fold(builder, |builder, name| builder.with_service_name(name))
    };
    let server = Server::builder()
        // Neither listed nor healthy: it only says where a dataplane belongs.
        .add_service(DataplaneServiceServer::new(NoSessions))
        .add_service(DnsServiceServer::new(api.clone()))
        .add_service(EventServiceServer::new(api.clone()))
        .add_service(FlowServiceServer::new(api.clone()))
        .add_service(ForwardServiceServer::new(api.clone()))
        .add_service(GrantServiceServer::new(api.clone()))
        .add_service(PendingServiceServer::new(api.clone()))
        .add_service(
            PolicyServiceServer::new(api.clone()).max_decoding_message_size(POLICY_MESSAGE_BYTES_MAX),
        )
        .add_service(VmServiceServer::new(api))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(
            reflection()
                .with_service_name("grpc.reflection.v1alpha.ServerReflection")
                .build_v1alpha()?,
        );
    Ok(server
        .serve_with_incoming_shutdown(listener, until(stopped))
        .await?)
}

async fn until(mut stopped: watch::Receiver<bool>) {
    // The sender being gone means the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}
