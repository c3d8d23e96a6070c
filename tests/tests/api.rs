//! The contract as programs meet it: reflection, health, refusals, lists as data, and what never
//! becomes a call.
#![cfg(target_os = "linux")]

use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use tokio::net::UnixStream;
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;
use vnet_proto::v1;
use vnet_tests::{Running, World, eventually, http, misses, staged};

/// The services of the design that the API's listeners serve.
const SERVICES: [&str; 8] = [
    "vnet.v1.DnsService",
    "vnet.v1.EventService",
    "vnet.v1.FlowService",
    "vnet.v1.ForwardService",
    "vnet.v1.GrantService",
    "vnet.v1.PendingService",
    "vnet.v1.PolicyService",
    "vnet.v1.VmService",
];

/// Starts the user's controlplane and does something with a channel to one of its sockets.
fn with_channel<F: Future<Output = ()>>(world: &World, socket: PathBuf, what: impl FnOnce(Channel) -> F) {
    world.vnetctl(&["vm", "list"]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a test can have a runtime");
    runtime.block_on(async {
        let channel = Endpoint::from_static("http://vnet")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .expect("the controlplane answers");
        what(channel).await;
    });
}

/// Lists the services and asks for the file of each, in one version of the protocol.
macro_rules! reflection {
    ($name:ident, $version:ident) => {
        async fn $name(channel: Channel) {
            use tonic_reflection::pb::$version::ServerReflectionRequest;
            use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
            use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;

            let mut questions = vec![MessageRequest::ListServices(String::new())];
            questions.extend(
                SERVICES
                    .iter()
                    .map(|service| MessageRequest::FileContainingSymbol((*service).to_owned())),
            );
            let requests: Vec<_> = questions
                .into_iter()
                .map(|question| ServerReflectionRequest {
                    host: String::new(),
                    message_request: Some(question),
                })
                .collect();
            let mut answers = ServerReflectionClient::new(channel)
                .server_reflection_info(tokio_stream::iter(requests))
                .await
                .expect("reflection is served")
                .into_inner();
            let mut files = 0;
            while let Some(answer) = answers.next().await {
                match answer.expect("an answer").message_response {
                    Some(MessageResponse::ListServicesResponse(list)) => {
                        let names: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
                        for service in SERVICES {
                            assert!(
                                names.iter().any(|n| n == service),
                                "{service} is not in {names:?}"
                            );
                        }
                        assert!(
                            names.iter().any(|n| n == "grpc.health.v1.Health"),
                            "{names:?}"
                        );
                    }
                    Some(MessageResponse::FileDescriptorResponse(found)) => {
                        assert!(!found.file_descriptor_proto.is_empty());
                        files += 1;
                    }
                    other => panic!("no answer: {other:?}"),
                }
            }
            assert_eq!(files, SERVICES.len());
        }
    };
}

reflection!(reflect_v1, v1);
reflection!(reflect_v1alpha, v1alpha);

#[test]
fn reflection_lists_every_service_in_both_versions() {
    staged(reflection_lists_every_service_in_both_versions, |world| {
        with_channel(world, world.control_socket(), |channel| async {
            reflect_v1(channel.clone()).await;
            reflect_v1alpha(channel).await;
        });
    });
}

#[test]
fn health_is_told_of_the_whole_and_of_every_service() {
    staged(health_is_told_of_the_whole_and_of_every_service, |world| {
        with_channel(world, world.control_socket(), |channel| async {
            let mut health = HealthClient::new(channel);
            for service in SERVICES.into_iter().chain([""]) {
                let request = HealthCheckRequest {
                    service: service.to_owned(),
                };
                let answer = health
                    .check(request)
                    .await
                    .expect("health is served")
                    .into_inner();
                assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
            }
        });
    });
}

#[test]
fn sessions_and_the_api_have_listeners_of_their_own() {
    staged(sessions_and_the_api_have_listeners_of_their_own, |world| {
        with_channel(world, world.control_socket(), |channel| async {
            let refused = v1::dataplane_service_client::DataplaneServiceClient::new(channel)
                .session(tokio_stream::empty::<v1::SessionRequest>())
                .await
                .expect_err("no session on the API's listener");
            assert_eq!(refused.code(), Code::Unimplemented, "{refused:?}");
            let details = refused.get_error_details();
            let info = details.error_info().expect("a detail says why");
            assert_eq!(info.reason, "SERVED_ELSEWHERE", "{info:?}");
            assert!(refused.message().contains("session.sock"), "{refused:?}");
        });
        let session = world.control_socket().with_file_name("session.sock");
        with_channel(world, session, |channel| async {
            let refused = v1::vm_service_client::VmServiceClient::new(channel)
                .list_vms(v1::ListVmsRequest::default())
                .await
                .expect_err("no API on the session's listener");
            assert_eq!(refused.code(), Code::Unimplemented, "{refused:?}");
        });
    });
}

#[test]
fn refusals_name_the_field_and_the_remedy() {
    staged(refusals_name_the_field_and_the_remedy, |world| {
        with_channel(world, world.control_socket(), |channel| async {
            let refused = v1::grant_service_client::GrantServiceClient::new(channel)
                .create_grant(v1::CreateGrantRequest {
                    action: v1::Action::Allow.into(),
                    ..Default::default()
                })
                .await
                .expect_err("a grant needs a target");
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
            let details = refused.get_error_details();
            let fields = &details
                .bad_request()
                .expect("a detail names the field")
                .field_violations;
            assert!(fields.iter().any(|f| f.field.contains("target")), "{fields:?}");
        });
    });
}

/// Every list there is.
const LISTS: [&[&str]; 10] = [
    &["pending", "list"],
    &["grants", "list"],
    &["vm", "list"],
    &["flows", "list"],
    &["events", "list"],
    &["policy", "revisions"],
    &["forward", "list"],
    &["dns", "zones", "list"],
    &["dns", "bindings"],
    &["dns", "denied"],
];

#[test]
fn every_list_is_data_on_request_and_a_table_otherwise() {
    staged(every_list_is_data_on_request_and_a_table_otherwise, |world| {
        http(world.internet(), "203.0.113.10:80");
        let policy = world.file("policy.yaml", "defaultAction: deny\n");
        world.vnetctl(&["policy", "apply", policy.to_str().expect("plain")]);
        world.vnetctl(&["allow", "tcp", "203.0.113.10:80", "--vm", "web"]);
        let script = "curl -sSN http://203.0.113.10/drip & curl -sS http://198.51.100.7/ & getent hosts x.example; wait";
        let mut run = world.run(
            &["--secure-mode", "--vm", "web", "-p", "127.0.0.1:8088:80"],
            &["sh", "-c", script],
        );
        run.prints("...");
        eventually("two questions are open", || world.pending().len() == 2);
        eventually("the flow is listed", || world.list(&["flows", "list"]).len() == 1);
        for list in LISTS {
            let items = world.list(list);
            let may_be_empty = list[0] == "dns";
            assert!(may_be_empty || !items.is_empty(), "{list:?} is empty");
            let yaml = world.vnetctl(&[list, &["-o", "yaml"]].concat());
            assert!(items.is_empty() || yaml.starts_with('-'), "{list:?}: {yaml}");
            let table = world.vnetctl(list);
            let heading = table.lines().next().unwrap_or_default();
            assert_eq!(heading, heading.to_uppercase(), "{list:?}: {table}");
        }
        let mut watch = Running::start(world.command(&["events", "watch", "--after", "0", "-o", "json"]));
        watch.prints("PENDING_OPENED");
        for line in watch.stdout().lines() {
            let event: serde_json::Value = serde_json::from_str(line).expect("one object a line");
            assert!(event["kind"].is_string(), "{event}");
        }
    });
}

#[test]
fn completions_know_the_commands() {
    staged(completions_know_the_commands, |world| {
        for shell in ["bash", "zsh", "fish"] {
            let script = world.vnetctl(&["completions", shell]);
            for word in ["run", "approve", "pending", "secure-mode"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
        let file = world.file("completions", &world.vnetctl(&["completions", "bash"]));
        let mut bash = world.program("bash");
        bash.arg("-n").arg(file);
        assert_eq!(Running::start(bash).wait().code, 0);
        assert_eq!(vnet_tests::descendants(), [], "nothing is started for it");
    });
}

#[test]
fn a_named_controlplane_that_is_not_there_is_an_error_that_says_how_to_start_it() {
    staged(
        a_named_controlplane_that_is_not_there_is_an_error_that_says_how_to_start_it,
        |world| {
            let server = "unix:///nonexistent/s";
            for command in [&["vm", "list"][..], &["events", "watch"], &["approve", "abcd"]] {
                let ended = world.try_vnetctl(&[&["--server", server], command].concat());
                assert_eq!(
                    (ended.code, ended.stdout.as_str()),
                    (1, ""),
                    "{command:?}: {ended:?}"
                );
                for said in [
                    &format!("no controlplane answers at {server}"),
                    &format!("start one with: vnet-controlplane --listen {server}"),
                ] {
                    assert!(ended.stderr.contains(said.as_str()), "{command:?}: {ended:?}");
                }
            }
            assert_eq!(vnet_tests::descendants(), [], "no other is started in its place");
        },
    );
}

#[test]
fn established_flows_and_cached_verdicts_ask_nobody() {
    staged(established_flows_and_cached_verdicts_ask_nobody, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let mut command = world.program("vnet-controlplane");
        command.args(["--log-level", "debug"]);
        let controlplane = Running::start(command);
        eventually("it serves", || world.control_socket().exists());
        let ended = world.script(
            &["--allow", "tcp 203.0.113.10:80"],
            "curl -sS 'http://203.0.113.10/[1-50]' > /dev/null; echo first; \
             for i in $(seq 30); do curl -sS http://203.0.113.10/bytes/100000 > /dev/null || exit 1; echo $i; done",
        );
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!((server.connections(), server.requests()), (31, 80));
        controlplane.signal(Signal::SIGTERM);
        assert_eq!(
            misses(&controlplane.wait()),
            1,
            "one miss, for the first connection"
        );
    });
}
