// Command review adds a provider key and reviews a diff with it.
//
//	review DIFF        with the settings in the environment (README.md)
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	byokeep "byokeep.dev/go"
	commonv1 "byokeep.dev/go/common/v1"
	orchestratorv1 "byokeep.dev/go/orchestrator/v1"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, arguments []string) error {
	if len(arguments) != 1 {
		return errors.New("usage: review DIFF")
	}
	diff, err := os.ReadFile(arguments[0])
	if err != nil {
		return err
	}
	trust, err := byokeep.LoadTrust(os.Getenv("BYOKEEP_TRUST"))
	if err != nil {
		return err
	}
	connection, err := byokeep.Dial(
		os.Getenv("BYOKEEP_ORCHESTRATOR"), os.Getenv("BYOKEEP_ORCHESTRATOR_NAME"),
		os.Getenv("BYOKEEP_CERTIFICATE"), os.Getenv("BYOKEEP_KEY"), trust,
	)
	if err != nil {
		return err
	}
	defer connection.Close()
	tenant := os.Getenv("BYOKEEP_TENANT")
	if err := addKey(ctx, orchestratorv1.NewKeyServiceClient(connection), trust, tenant); err != nil {
		return err
	}
	return review(ctx, orchestratorv1.NewReviewServiceClient(connection), tenant, diff)
}

func addKey(
	ctx context.Context, keys orchestratorv1.KeyServiceClient, trust *byokeep.Trust, tenant string,
) error {
	seal := byokeep.Context{
		Tenant: tenant, Provider: "openai", KeyID: byokeep.NewID("key"), Operation: "add",
		RequestID: byokeep.NewID("req"),
	}
	sealed, err := byokeep.Seal(ctx, keys, trust, seal, os.Getenv("OPENAI_API_KEY"))
	if err != nil {
		return err
	}
	added, err := keys.AddKey(ctx, &orchestratorv1.AddKeyRequest{
		Parent: "tenants/" + tenant, KeyId: seal.KeyID, Provider: commonv1.Provider_PROVIDER_OPENAI,
		DisplayName: "from-go", SealedKey: sealed, RequestId: seal.RequestID,
	})
	if err != nil {
		return err
	}
	watched, err := keys.WatchKey(ctx, &orchestratorv1.WatchKeyRequest{Name: added.Key.ProviderKey.Name})
	if err != nil {
		return err
	}
	for {
		answer, err := watched.Recv()
		if err != nil {
			return err
		}
		if answer.Done {
			fmt.Println("key", seal.KeyID, strings.TrimPrefix(
				answer.Key.Validation.Verdict.String(), "VALIDATION_VERDICT_"))
			return nil
		}
	}
}

func review(
	ctx context.Context, reviews orchestratorv1.ReviewServiceClient, tenant string, diff []byte,
) error {
	submitted, err := reviews.SubmitReview(ctx, &orchestratorv1.SubmitReviewRequest{
		Parent:    "tenants/" + tenant,
		Input:     &orchestratorv1.ReviewInput{Repository: "acme/shop", Diff: diff},
		RequestId: byokeep.NewID("req"),
	})
	if err != nil {
		return err
	}
	ended, err := watch(ctx, reviews, submitted.Review.Name)
	if err != nil {
		return err
	}
	if ended.State != orchestratorv1.ReviewState_REVIEW_STATE_COMPLETED {
		return fmt.Errorf("%v: %v: %s", ended.State, ended.Failure, ended.FailureMessage)
	}
	for _, finding := range ended.Findings {
		fmt.Printf("%s:%d %s %s\n", finding.Path, finding.StartLine, finding.Severity, finding.Title)
	}
	fmt.Printf("%d findings by %s\n", ended.FindingCount, ended.Model)
	return nil
}

// watch follows a review to its end. The stream begins with the present state, so that one that
// was lost is opened again and misses nothing.
func watch(
	ctx context.Context, reviews orchestratorv1.ReviewServiceClient, name string,
) (*orchestratorv1.Review, error) {
	for {
		stream, err := reviews.WatchReview(ctx, &orchestratorv1.WatchReviewRequest{Name: name})
		for err == nil {
			var answer *orchestratorv1.WatchReviewResponse
			if answer, err = stream.Recv(); err == nil && ended(answer.Review.State) {
				return whole(ctx, reviews, answer)
			}
		}
		// ResourceExhausted: more watch than are served at once.
		code := status.Code(err)
		if err != io.EOF && code != codes.Unavailable && code != codes.ResourceExhausted {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// whole reads the pages of findings that follow the first.
func whole(
	ctx context.Context, reviews orchestratorv1.ReviewServiceClient,
	answer *orchestratorv1.WatchReviewResponse,
) (*orchestratorv1.Review, error) {
	review, token := answer.Review, answer.NextPageToken
	for token != "" {
		page, err := reviews.GetReview(
			ctx, &orchestratorv1.GetReviewRequest{Name: review.Name, PageToken: token},
		)
		if err != nil {
			return nil, err
		}
		review.Findings = append(review.Findings, page.Review.Findings...)
		token = page.NextPageToken
	}
	return review, nil
}

func ended(state orchestratorv1.ReviewState) bool {
	return state == orchestratorv1.ReviewState_REVIEW_STATE_COMPLETED ||
		state == orchestratorv1.ReviewState_REVIEW_STATE_FAILED ||
		state == orchestratorv1.ReviewState_REVIEW_STATE_CANCELLED
}
