// Reads a dashboard and a Deployment as strictly as Grafana's and Kubernetes' own types can, and says what is wrong.
package main

import (
	"fmt"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"
)

func main() {
	plugins.RegisterDefaultPlugins()
	var board dashboard.Dashboard
	// Its error is an empty list, not nil, where nothing is wrong.
	if err := board.UnmarshalJSONStrict(read(os.Args[1])); err != nil && err.Error() != "" {
		fmt.Println("dashboard:", err)
	}
	var deployment appsv1.Deployment
	if err := yaml.UnmarshalStrict(read(os.Args[2]), &deployment, yaml.DisallowUnknownFields); err != nil {
		fmt.Println("deployment:", err)
	}
	fmt.Println(len(board.Panels), "panels,", len(deployment.Spec.Template.Spec.Containers), "containers")
}

func read(path string) []byte {
	data, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	return data
}
