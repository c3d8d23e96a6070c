//! Answers and other changes: what is sent, what is said, and what a refusal looks like.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use vnet_proto::v1;

use super::scripted::Scripted;
use super::{domain, named, run, run_all, tcp, until_vm_stops};
use crate::output::Format;

fn request(id: &str) -> Option<v1::PendingRequest> {
    Some(v1::PendingRequest {
        id: id.to_owned(),
        etag: format!("etag-of-{id}"),
        vm: "web".to_owned(),
        target: tcp("10.99.0.1", 8080),
        ..Default::default()
    })
}

fn grant(action: v1::Action, target: Option<v1::Target>) -> Option<v1::Grant> {
    Some(v1::Grant {
        id: "g1".to_owned(),
        action: action.into(),
        target,
        vms: named("web"),
        lifetime: until_vm_stops(),
        ..Default::default()
    })
}

#[tokio::test]
async fn approve_sends_the_id_as_it_was_read_off_and_reads_nothing_else_in_its_place() {
    let server = Scripted::start();
    server.answer(
        "PendingService/Approve",
        &v1::ApproveResponse {
            request: request("01abcd"),
            grant: grant(v1::Action::Allow, tcp("10.99.0.1", 8080)),
        },
    );

    let said = run(
        &server,
        Format::Table,
        &["approve", "01ab", "--reason", "package upgrade"],
    )
    .await
    .unwrap();

    assert_eq!(
        said,
        "approved 01abcd: allow tcp 10.99.0.1:8080 for web, until the VM stops (grant g1)\n"
    );
    let asked: Vec<v1::ApproveRequest> = server.asked("PendingService/Approve");
    let expected = v1::ApproveRequest {
        id: "01ab".to_owned(),
        reason: "package upgrade".to_owned(),
        ..Default::default()
    };
    assert_eq!(
        asked,
        [expected],
        "narrowest scope, that VM, until it stops: all unset"
    );
}

#[tokio::test]
async fn approve_passes_scope_lifetime_and_vms_on() {
    let server = Scripted::start();
    server.answer("PendingService/Approve", &v1::ApproveResponse::default());

    let words = [
        "approve",
        "01ab",
        "--scope",
        "subdomains",
        "--for",
        "1h",
        "--all-vms",
        "--connections",
        "3",
        "--bytes-up",
        "5MiB",
    ];
    run(&server, Format::Json, &words).await.unwrap();

    let asked: Vec<v1::ApproveRequest> = server.asked("PendingService/Approve");
    assert_eq!(asked[0].scope(), v1::Scope::Subdomains);
    assert_eq!(
        asked[0].lifetime.and_then(|l| l.kind),
        Some(v1::lifetime::Kind::Duration(prost_types::Duration {
            seconds: 3600,
            nanos: 0
        }))
    );
    assert!(asked[0].vms.as_ref().unwrap().all);
    let budget = v1::Budget {
        connections: 3,
        bytes_up: 5 << 20,
        bytes_down: 0,
    };
    assert_eq!(asked[0].budget, Some(budget));
}

#[tokio::test]
async fn allow_says_the_budget_that_it_was_given() {
    let server = Scripted::start();
    let budget = Some(v1::Budget {
        bytes_down: 50_000_000,
        ..Default::default()
    });
    let made = v1::Grant {
        budget,
        ..grant(v1::Action::Allow, tcp("10.99.0.1", 80)).unwrap()
    };
    let answer = v1::CreateGrantResponse {
        grant: Some(made),
        ..Default::default()
    };
    server.answer("GrantService/CreateGrant", &answer);

    let words = ["allow", "tcp 10.99.0.1:80", "--vm", "web", "--bytes-down", "50MB"];
    let said = run(&server, Format::Table, &words).await.unwrap();

    assert_eq!(
        said,
        "allow tcp 10.99.0.1:80 for web, until the VM stops, at most 50.0 MB down (grant g1)\n"
    );
    let asked: Vec<v1::CreateGrantRequest> = server.asked("GrantService/CreateGrant");
    assert_eq!(asked[0].budget, budget);
}

#[tokio::test]
async fn one_id_that_fails_does_not_keep_the_others_from_being_answered() {
    let server = Scripted::start();
    server.refuse(
        "PendingService/Deny",
        Status::not_found("no pending request has an id that begins with 02cd"),
    );
    server.answer(
        "PendingService/Deny",
        &v1::DenyResponse {
            request: request("01abcd"),
            grant: grant(v1::Action::Deny, tcp("10.99.0.1", 8080)),
            cut: None,
        },
    );

    let (said, result) = run_all(&server, Format::Table, &["deny", "02cd", "01ab"]).await;

    assert!(
        said.starts_with("denied 01abcd: deny tcp 10.99.0.1:8080 for web"),
        "{said}"
    );
    assert_eq!(result.unwrap_err().exit_code(), 1);
}

/// A request for a name, guarded or not.
fn named_request(id: &str, name: &str, guarded: bool) -> v1::PendingRequest {
    v1::PendingRequest {
        id: id.to_owned(),
        etag: format!("{id}-1"),
        vm: "web".to_owned(),
        names: vec![name.to_owned()],
        state: v1::PendingState::Open.into(),
        guards: if guarded {
            vec![v1::Guard::PrivateFromDns.into()]
        } else {
            Vec::new()
        },
        ..Default::default()
    }
}

fn names_asked() -> v1::ListPendingResponse {
    v1::ListPendingResponse {
        requests: vec![
            named_request("r1", "a.example.com", false),
            named_request("r2", "example.com", false),
            named_request("r3", "b.c.example.com", false),
            named_request("r4", "in.example.com", true),
            named_request("r5", "notexample.com", false),
            v1::PendingRequest::default(),
        ],
        ..Default::default()
    }
}

#[tokio::test]
async fn approve_of_what_matches_answers_each_as_it_was_listed_and_says_how_many() {
    let server = Scripted::start();
    server.answer("PendingService/ListPending", &names_asked());
    server.answer(
        "PendingService/Approve",
        &v1::ApproveResponse {
            request: request("r1"),
            grant: grant(v1::Action::Allow, domain("*.example.com")),
        },
    );
    // The yes to the first has decided the second.
    server.refuse(
        "PendingService/Approve",
        Status::failed_precondition("it is decided"),
    );
    let decided = v1::GetPendingResponse {
        request: Some(v1::PendingRequest {
            state: v1::PendingState::Decided.into(),
            ..named_request("r3", "b.c.example.com", false)
        }),
    };
    server.answer("PendingService/GetPending", &decided);

    let words = [
        "approve",
        "--vm",
        "web",
        "--matching",
        "*.example.com",
        "--scope",
        "subdomains",
    ];
    let said = run(&server, Format::Table, &words).await.unwrap();

    assert_eq!(
        said,
        "approved r1: allow domain *.example.com for web, until the VM stops (grant g1)\n\
         approved 2 requests for names that fit *.example.com, 1 of them by the answers to others; 1 request \
         left out, under a guard: answer each by its id\n"
    );
    let listed: Vec<v1::ListPendingRequest> = server.asked("PendingService/ListPending");
    assert_eq!(listed[0].vms, named("web"));
    let asked: Vec<v1::ApproveRequest> = server.asked("PendingService/Approve");
    let asked: Vec<_> = asked
        .iter()
        .map(|a| (a.id.as_str(), a.etag.as_str(), a.scope(), a.vms.clone()))
        .collect();
    assert_eq!(
        asked,
        [
            ("r1", "r1-1", v1::Scope::Subdomains, None),
            ("r3", "r3-1", v1::Scope::Subdomains, None)
        ]
    );
}

#[tokio::test]
async fn deny_of_what_matches_leaves_nothing_out_and_stops_at_a_refusal() {
    let server = Scripted::start();
    server.answer("PendingService/ListPending", &names_asked());
    let denied = |id: &str| v1::DenyResponse {
        request: request(id),
        grant: grant(v1::Action::Deny, domain("a.example.com")),
        cut: Some(v1::CutReport {
            flows: 3,
            dataplanes_cut: 2,
            ..Default::default()
        }),
    };
    server.answer("PendingService/Deny", &denied("r1"));
    server.answer("PendingService/Deny", &denied("r3"));
    server.refuse(
        "PendingService/Deny",
        Status::resource_exhausted("too many grants"),
    );
    let open = v1::GetPendingResponse {
        request: Some(named_request("r4", "in.example.com", true)),
    };
    server.answer("PendingService/GetPending", &open);

    let words = ["deny", "--matching", "*.example.com"];
    let (said, result) = run_all(&server, Format::Table, &words).await;

    assert!(
        said.starts_with(
            "denied r1: deny domain a.example.com for web, until the VM stops (grant g1); 3 live flows on 2 \
             dataplanes were cut\n"
        ),
        "{said}"
    );
    let asked: Vec<v1::DenyRequest> = server.asked("PendingService/Deny");
    let asked: Vec<&str> = asked.iter().map(|a| a.id.as_str()).collect();
    assert_eq!(asked, ["r1", "r3", "r4"]);
    assert_eq!(result.unwrap_err().to_string(), "too many grants");
}

#[tokio::test]
async fn what_matches_nothing_is_a_failure_and_answers_nothing() {
    let server = Scripted::start();
    server.answer("PendingService/ListPending", &names_asked());

    let words = ["approve", "--matching", "*.example.org"];
    let error = run(&server, Format::Table, &words).await.unwrap_err();

    assert!(error.to_string().contains("fits *.example.org"), "{error}");
    assert_eq!(error.exit_code(), 1);
    for words in [
        &["approve", "01ab", "--matching", "*.example.org"][..],
        &["approve"],
        &["deny", "--matching", "*.exa mple.org"],
    ] {
        let error = run(&server, Format::Table, words).await.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{words:?}: {error}");
    }
}

#[tokio::test]
async fn a_flow_that_is_closed_is_said_to_be_cut_when_it_is() {
    let server = Scripted::start();
    let flow = v1::Flow {
        id: "f1".to_owned(),
        vm: "web".to_owned(),
        ..Default::default()
    };
    let answer = v1::CloseFlowResponse {
        flow: Some(flow),
        cut: Some(v1::CutReport {
            flows: 1,
            dataplanes_acknowledged: 1,
            dataplanes_cut: 1,
            ..Default::default()
        }),
    };
    server.answer("FlowService/CloseFlow", &answer);

    let said = run(&server, Format::Table, &["flows", "close", "f1ab"])
        .await
        .unwrap();

    assert!(
        said.ends_with("(flow f1); 1 live flow on 1 dataplane was cut\n"),
        "{said}"
    );
}

#[tokio::test]
async fn deny_of_a_destination_makes_a_grant() {
    let server = Scripted::start();
    let answer = v1::CreateGrantResponse {
        grant: grant(v1::Action::Deny, domain("*.malware.example")),
        answered: 1,
        cut: Some(v1::CutReport {
            flows: 2,
            ..Default::default()
        }),
    };
    server.answer("GrantService/CreateGrant", &answer);

    let said = run(
        &server,
        Format::Table,
        &["deny", "domain", "*.malware.example", "--vm", "web"],
    )
    .await
    .unwrap();

    assert_eq!(
        said,
        "deny domain *.malware.example for web, until the VM stops (grant g1); it answered 1 pending request; \
         2 live flows were cut\n"
    );
    let asked: Vec<v1::CreateGrantRequest> = server.asked("GrantService/CreateGrant");
    assert_eq!(asked[0].action(), v1::Action::Deny);
    assert_eq!(asked[0].target, domain("*.malware.example"));
    assert_eq!(asked[0].vms, named("web"));
    assert_eq!(asked[0].lifetime, None, "for ever, by default");
    assert!(
        !asked[0].request_id.is_empty(),
        "a call repeated after a lost answer makes one grant"
    );
}

#[tokio::test]
async fn a_destination_that_makes_no_sense_is_usage_and_asks_no_server() {
    let server = Scripted::start();
    for words in [
        &["allow", "tcp", "10.0.0.1/8:80"][..],
        &["allow", "icmp", "10.0.0.1:80"],
        &["allow", "tcp"],
        &["allow", "01abcd"],
        &["deny", "domain", "*"],
        &["deny", "tcp", "10.0.0.1", "--scope", "host"],
        &["policy", "explain", "tpc", "10.0.0.1:80"],
        &["allow", "tcp", "10.0.0.1:80", "--for", "1ms"],
    ] {
        let error = run(&server, Format::Table, words).await.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{words:?}: {error}");
    }
    assert!(
        server
            .asked::<v1::CreateGrantRequest>("GrantService/CreateGrant")
            .is_empty()
    );
}

#[tokio::test]
async fn a_refusal_names_what_is_wrong_and_what_helps() {
    let server = Scripted::start();
    let mut details = ErrorDetails::new();
    details.add_precondition_failure_violation("VM", "vms", "there are 2 VMs: a, b");
    details.add_help_link("name one with --vm NAME, or say --all-vms", "");
    server.refuse(
        "GrantService/CreateGrant",
        Status::with_error_details(Code::FailedPrecondition, "it is not said for which VM", details),
    );

    let error = run(&server, Format::Table, &["allow", "tcp", "10.0.0.1:80"])
        .await
        .unwrap_err();

    assert_eq!(error.exit_code(), 1);
    assert_eq!(
        error.to_string(),
        "it is not said for which VM\n  vms: there are 2 VMs: a, b\n  name one with --vm NAME, or say --all-vms"
    );
}

#[tokio::test]
async fn policy_show_prints_the_document_and_nothing_else() {
    let server = Scripted::start();
    let policy = v1::Policy {
        name: "default".to_owned(),
        revision: 3,
        document: "defaultAction: deny\nrules: []\n".to_owned(),
        ..Default::default()
    };
    server.answer(
        "PolicyService/GetPolicy",
        &v1::GetPolicyResponse {
            policy: Some(policy),
            ..Default::default()
        },
    );

    let printed = run(&server, Format::Table, &["policy", "show"]).await.unwrap();

    assert_eq!(printed, "defaultAction: deny\nrules: []\n");
}

#[tokio::test]
async fn a_mode_says_who_has_not_acknowledged_it() {
    let server = Scripted::start();
    let answer = v1::UpdateVmResponse {
        vm: Some(v1::Vm {
            name: "web".to_owned(),
            mode: v1::Mode::Block.into(),
            ..Default::default()
        }),
        cut: Some(v1::CutReport {
            flows: 1,
            dataplanes_silent: vec!["host-9".to_owned()],
            ..Default::default()
        }),
    };
    server.answer("VmService/UpdateVm", &answer);

    let said = run(&server, Format::Table, &["vm", "mode", "web", "block"])
        .await
        .unwrap();

    assert_eq!(
        said,
        "web is in mode block; 1 live flow was cut; not acknowledged yet by host-9 (their verdicts end with their leases)\n"
    );
    let asked: Vec<v1::UpdateVmRequest> = server.asked("VmService/UpdateVm");
    assert_eq!(asked[0].mode(), v1::Mode::Block);
}

#[tokio::test]
async fn a_forward_without_a_guest_leads_to_the_vm_that_was_named() {
    let server = Scripted::start();
    let vm = v1::Vm {
        name: "web".to_owned(),
        network: "up-1".to_owned(),
        addresses: vec!["192.168.127.5".to_owned()],
        ..Default::default()
    };
    server.answer("VmService/GetVm", &v1::GetVmResponse { vm: Some(vm) });
    let forward = v1::Forward {
        network: "up-1".to_owned(),
        protocol: v1::Protocol::Tcp.into(),
        listen: "127.0.0.1:8080".to_owned(),
        target: "192.168.127.5:80".to_owned(),
        ..Default::default()
    };
    server.answer(
        "ForwardService/CreateForward",
        &v1::CreateForwardResponse {
            forward: Some(forward.clone()),
            forwards: vec![forward.clone()],
        },
    );

    let said = run(
        &server,
        Format::Table,
        &["forward", "add", "8080:80", "--vm", "web"],
    )
    .await
    .unwrap();

    assert_eq!(said, "opened tcp 127.0.0.1:8080 -> 192.168.127.5:80\n");
    let asked: Vec<v1::CreateForwardRequest> = server.asked("ForwardService/CreateForward");
    assert_eq!((asked[0].forward.as_ref(), asked[0].count), (Some(&forward), 1));
}

#[tokio::test]
async fn a_range_is_asked_for_at_once_and_said_as_one() {
    let server = Scripted::start();
    let first = v1::Forward {
        network: "up-1".to_owned(),
        protocol: v1::Protocol::Udp.into(),
        listen: "0.0.0.0:8000".to_owned(),
        target: "192.168.127.5:9000".to_owned(),
        keep_client_address: true,
        ..Default::default()
    };
    let forwards = vec![first.clone(); 11];
    server.answer(
        "ForwardService/CreateForward",
        &v1::CreateForwardResponse {
            forward: Some(first.clone()),
            forwards: forwards.clone(),
        },
    );
    let given = "0.0.0.0:8000-8010:192.168.127.5:9000-9010/udp+client";
    let words = ["forward", "add", given, "--network", "up-1"];
    let said = run(&server, Format::Table, &words).await.unwrap();
    assert_eq!(
        said,
        "opened udp 0.0.0.0:8000-8010 -> 192.168.127.5:9000-9010, with the client's address\n"
    );
    let asked: Vec<v1::CreateForwardRequest> = server.asked("ForwardService/CreateForward");
    assert_eq!((asked[0].forward.as_ref(), asked[0].count), (Some(&first), 11));

    let answer = v1::DeleteForwardResponse {
        forward: Some(first),
        cut: Some(v1::CutReport {
            dataplanes_acknowledged: 1,
            ..Default::default()
        }),
        forwards,
    };
    server.answer("ForwardService/DeleteForward", &answer);
    let words = ["forward", "remove", "0.0.0.0:8000-8010/udp"];
    let said = run(&server, Format::Table, &words).await.unwrap();
    assert!(
        said.starts_with("closed udp 0.0.0.0:8000-8010 -> 192.168.127.5:9000-9010"),
        "{said}"
    );
    let asked: Vec<v1::DeleteForwardRequest> = server.asked("ForwardService/DeleteForward");
    assert_eq!((asked[0].listen.as_str(), asked[0].count), ("0.0.0.0:8000", 11));
}

#[tokio::test]
async fn closing_a_forward_says_what_it_cut() {
    let server = Scripted::start();
    let forward = v1::Forward {
        network: "up-1".to_owned(),
        protocol: v1::Protocol::Udp.into(),
        listen: "127.0.0.1:5353".to_owned(),
        target: "192.168.127.5:53".to_owned(),
        ..Default::default()
    };
    let answer = v1::DeleteForwardResponse {
        forward: Some(forward.clone()),
        forwards: vec![forward],
        cut: Some(v1::CutReport {
            flows: 2,
            dataplanes_acknowledged: 1,
            dataplanes_cut: 1,
            ..Default::default()
        }),
    };
    server.answer("ForwardService/DeleteForward", &answer);

    let said = run(
        &server,
        Format::Table,
        &["forward", "remove", "127.0.0.1:5353/udp"],
    )
    .await
    .unwrap();

    assert_eq!(
        said,
        "closed udp 127.0.0.1:5353 -> 192.168.127.5:53; 2 live flows on 1 dataplane were cut\n"
    );
}

#[tokio::test]
async fn explain_says_the_answer_and_what_would_change_it() {
    let server = Scripted::start();
    let answer = v1::ExplainResponse {
        action: v1::Action::Deny.into(),
        reason: Some(v1::Reason {
            step: "rule".to_owned(),
            subject: "rules[1]".to_owned(),
            text: "denies 10.0.0.0/8".to_owned(),
        }),
        policy: "default".to_owned(),
        revision: 2,
        remedy: "change rules[1]".to_owned(),
        r#match: "tcp 10.0.0.0/8:*".to_owned(),
        ..Default::default()
    };
    server.answer("PolicyService/Explain", &answer);

    let said = run(
        &server,
        Format::Table,
        &["policy", "explain", "tcp", "10.0.0.1:80"],
    )
    .await
    .unwrap();

    assert_eq!(
        said,
        "\
Answer:        deny
Because:       rule rules[1]: denies 10.0.0.0/8
Policy:        default (revision 2)
Same for:      tcp 10.0.0.0/8:*
Names:         -
Guards:        -
To change it:  change rules[1]
"
    );
}

#[tokio::test]
async fn a_zone_without_a_record_is_made_only_where_that_was_said() {
    let server = Scripted::start();
    let refused = run(&server, Format::Table, &["dns", "zones", "set", "ads.example"])
        .await
        .unwrap_err();
    assert_eq!(refused.exit_code(), 2);
    for part in ["zone ads.example would have no record", "--empty", "--default"] {
        assert!(refused.to_string().contains(part), "{refused}");
    }
    assert_eq!(server.asked::<v1::SetZoneRequest>("DnsService/SetZone"), []);

    let zone = v1::Zone {
        name: "ads.example".to_owned(),
        ..Default::default()
    };
    server.answer(
        "DnsService/SetZone",
        &v1::SetZoneResponse {
            zone: Some(zone.clone()),
        },
    );
    let words = ["dns", "zones", "set", "ads.example", "--empty"];
    let said = run(&server, Format::Table, &words).await.unwrap();
    assert_eq!(said, "zone ads.example is empty: no name in it exists\n");
    assert_eq!(
        server.asked::<v1::SetZoneRequest>("DnsService/SetZone"),
        [v1::SetZoneRequest {
            zone: Some(zone),
            prepend_records: false
        }]
    );
}

#[tokio::test]
async fn records_are_added_before_those_that_are_there_and_removed_one_by_one() {
    let server = Scripted::start();
    let zone = v1::Zone {
        name: "lab.internal".to_owned(),
        records: vec![v1::ZoneRecord::default(); 3],
        default_address: "10.0.0.9".to_owned(),
        ..Default::default()
    };
    let answer = v1::SetZoneResponse {
        zone: Some(zone.clone()),
    };
    server.answer("DnsService/SetZone", &answer);
    let words = [
        "dns",
        "zones",
        "add",
        "lab.internal",
        "db=10.0.0.1",
        "--default",
        "10.0.0.9",
        "--network",
        "n",
    ];
    let said = run(&server, Format::Table, &words).await.unwrap();
    assert_eq!(said, "zone lab.internal has 3 records; all else is 10.0.0.9\n");
    let asked = server.asked::<v1::SetZoneRequest>("DnsService/SetZone");
    let sent = asked[0].zone.as_ref().unwrap();
    assert!(asked[0].prepend_records);
    assert_eq!(
        (&*sent.network, &*sent.records[0].name, &*sent.default_address),
        ("n", "db", "10.0.0.9")
    );

    let answer = v1::DeleteZoneRecordResponse { zone: Some(zone) };
    server.answer("DnsService/DeleteZoneRecord", &answer);
    server.answer("DnsService/DeleteZoneRecord", &answer);
    let words = ["dns", "zones", "remove", "lab.internal", "db", "/x/=10.0.0.1"];
    run(&server, Format::Table, &words).await.unwrap();
    let asked = server.asked::<v1::DeleteZoneRecordRequest>("DnsService/DeleteZoneRecord");
    let records: Vec<&v1::ZoneRecord> = asked
        .iter()
        .filter_map(|request| request.record.as_ref())
        .collect();
    assert_eq!(records.len(), 2);
    assert_eq!(
        (&*records[0].name, &*records[1].regexp, &*records[1].address),
        ("db", "x", "10.0.0.1")
    );
    assert_eq!(server.asked::<v1::DeleteZoneRequest>("DnsService/DeleteZone"), []);
}

#[tokio::test]
async fn what_is_empty_is_named_as_what_it_is() {
    let server = Scripted::start();
    for (words, said) in [
        (&["vm", "list", "--vm", ""][..], "expected a VM's name"),
        (
            &["allow", "tcp", "192.0.2.7:443", "--vm", ""],
            "expected a VM's name",
        ),
        (
            &["policy", "explain", "--vm", "", "tcp", "192.0.2.7:443"],
            "expected a VM's name",
        ),
        (
            &["allow", "domain", "foo..bar"],
            "the name begins with a dot, or has two in a row",
        ),
    ] {
        let refused = run(&server, Format::Table, words).await.unwrap_err();
        assert_eq!(refused.exit_code(), 2, "{words:?}");
        assert!(refused.to_string().contains(said), "{words:?}: {refused}");
    }
}
