//! What is said of policies that are not in force, and of what is cached.

use super::*;

fn change(count: u64) -> v1::VerdictChange {
    let reason = |step: &str, subject: &str| {
        Some(v1::Reason {
            step: step.to_owned(),
            subject: subject.to_owned(),
            text: String::new(),
        })
    };
    v1::VerdictChange {
        vm: "web".to_owned(),
        target: tcp("192.0.2.7/32", 443),
        names: vec!["a.example.com".to_owned()],
        before: v1::Action::Allow.into(),
        before_reason: reason("rule", "old"),
        after: v1::Action::Deny.into(),
        after_reason: reason("default", "deny"),
        count,
        last_at: None,
    }
}

fn policy_file(text: &str) -> std::path::PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("vnetctl-{}-{number}.yaml", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test]
async fn a_diff_exits_with_three_where_something_differs_and_zero_where_nothing_does() {
    let server = Scripted::start();
    let file = policy_file("version: 1\n");
    let words = ["policy", "diff", file.to_str().unwrap(), "--mode", "ask"];
    let differs = v1::DiffPolicyResponse {
        changes: vec![change(4)],
        ..Default::default()
    };
    server.answer("PolicyService/DiffPolicy", &differs);
    let (printed, result) = run_all(&server, Format::Table, &words).await;
    let failure = result.unwrap_err();
    assert_eq!((failure.exit_code(), failure.message()), (3, None));
    for part in ["tcp 192.0.2.7:443", "a.example.com", "allow", "old", "deny"] {
        assert!(printed.contains(part), "{part} is not in {printed}");
    }
    let asked: v1::DiffPolicyRequest = server.asked("PolicyService/DiffPolicy").pop().unwrap();
    assert_eq!(
        (asked.document.as_str(), asked.mode),
        ("version: 1\n", v1::Mode::Ask as i32)
    );

    server.answer("PolicyService/DiffPolicy", &v1::DiffPolicyResponse::default());
    let (printed, result) = run_all(&server, Format::Table, &words).await;
    assert!(result.is_ok() && printed.is_empty(), "{printed}");
    std::fs::remove_file(file).unwrap();
}

#[tokio::test]
async fn a_suggestion_is_printed_alone() {
    let server = Scripted::start();
    let suggested = v1::SuggestResponse {
        document: "version: 1\n".to_owned(),
        ..Default::default()
    };
    server.answer("PolicyService/Suggest", &suggested);
    let words = [
        "policy",
        "suggest",
        "--from-grants",
        "--since",
        "1h",
        "--vm",
        "web",
    ];
    let printed = run(&server, Format::Table, &words).await.unwrap();
    assert_eq!(printed, "version: 1\n");
    let asked: v1::SuggestRequest = server.asked("PolicyService/Suggest").pop().unwrap();
    assert!(asked.from_grants && asked.time.is_some());
    assert_eq!(asked.vms, named("web"));
}

#[tokio::test]
async fn a_policy_is_applied_for_a_while_and_confirmed() {
    let server = Scripted::start();
    let file = policy_file("version: 1\n");
    let policy = v1::Policy {
        name: "build".to_owned(),
        revision: 4,
        ..Default::default()
    };
    let applied = v1::ApplyPolicyResponse {
        policy: Some(policy.clone()),
        ..Default::default()
    };
    server.answer("PolicyService/ApplyPolicy", &applied);
    let words = [
        "policy",
        "apply",
        file.to_str().unwrap(),
        "--name",
        "build",
        "--confirm-within",
        "90s",
    ];
    let printed = run(&server, Format::Table, &words).await.unwrap();
    assert!(
        printed.ends_with("unless this comes: vnetctl policy confirm --name build\n"),
        "{printed}"
    );
    let asked: v1::ApplyPolicyRequest = server.asked("PolicyService/ApplyPolicy").pop().unwrap();
    assert_eq!(asked.confirm_within.map(|span| span.seconds), Some(90));

    server.answer(
        "PolicyService/ConfirmPolicy",
        &v1::ConfirmPolicyResponse { policy: Some(policy) },
    );
    let words = ["policy", "confirm", "--name", "build", "--revision", "4"];
    let printed = run(&server, Format::Table, &words).await.unwrap();
    assert_eq!(printed, "revision 4 of policy build stays\n");
    let asked: v1::ConfirmPolicyRequest = server.asked("PolicyService/ConfirmPolicy").pop().unwrap();
    assert_eq!((asked.name.as_str(), asked.revision), ("build", 4));
    std::fs::remove_file(file).unwrap();
}

#[tokio::test]
async fn a_cached_verdict_that_differs_fails_and_is_listed() {
    let server = Scripted::start();
    let mut answer = v1::VerifyVerdictsResponse {
        seed: 7,
        verdicts: 3,
        points: 30,
        vms: 1,
        ..Default::default()
    };
    server.answer("FlowService/VerifyVerdicts", &answer);
    let (printed, result) = run_all(&server, Format::Table, &["dataplane", "verify"]).await;
    assert!(result.is_ok() && printed.is_empty(), "{printed}");

    answer.mismatches_in_all = 1;
    answer.mismatches = vec![v1::VerdictMismatch {
        vm: "web".to_owned(),
        r#match: "tcp 192.0.2.0/23:443".to_owned(),
        point: "tcp 192.0.3.1:443".to_owned(),
        cached: v1::Action::Allow.into(),
        decided: v1::Action::Deny.into(),
        ..Default::default()
    }];
    server.answer("FlowService/VerifyVerdicts", &answer);
    let (printed, result) = run_all(&server, Format::Table, &["dataplane", "verify", "--vm", "web"]).await;
    let failure = result.unwrap_err();
    assert_eq!(failure.exit_code(), 1);
    assert!(failure.to_string().contains("--seed 7"), "{failure}");
    assert!(printed.contains("tcp 192.0.3.1:443"), "{printed}");

    answer.mismatches_in_all = 0;
    answer.mismatches.clear();
    answer.vms_silent = vec!["web".to_owned()];
    server.answer("FlowService/VerifyVerdicts", &answer);
    let silent = run(&server, Format::Json, &["dataplane", "verify"])
        .await
        .unwrap_err();
    assert!(silent.to_string().contains("did not answer: web"), "{silent}");
}
